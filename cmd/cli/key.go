package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/headscale"
)

func keyCmd() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Look at Headscale's keys, replace them, and end those that nodes joined with",
		Long: "Look at Headscale's keys, replace them, and end those that nodes joined with. show and rotate take a kubeconfig; joined and revoke ask\n" +
			"Headscale with the URL and the API key of headcni-controller, so in Kubernetes they are run there:\n\n" +
			"  kubectl -n kube-system exec deploy/headcni-controller -- headcnictl key joined\n\n" +
			"Elsewhere it takes headscale.url of daemon.yaml (or HEADCNI_HEADSCALE_URL), and the API key from HEADSCALE_API_KEY_FILE or\n" +
			"headscale.apiKeyFile.",
	}
	cmd.PersistentFlags().StringVar(&file, "config", paths.ConfigFile, "daemon.yaml")
	connect := func(ctx context.Context) (*headscale.Client, error) { return connectAPI(ctx, file) }
	joined := keyJoinedCmd(connect)
	unanswered(joined)
	cmd.AddCommand(keyCheckCmd(&file), joined, keyRevokeCmd(connect), keyRotateCmd(&file), keyShowCmd(&file))
	return cmd
}

// connectAPI is a client with an API key.
func connectAPI(ctx context.Context, file string) (*headscale.Client, error) {
	c, err := config.Load(file, file == paths.ConfigFile, os.Environ(), nil)
	if err != nil {
		return nil, err
	}
	if c.Headscale.URL == "" {
		return nil, errors.New("headscale.url is empty: set HEADCNI_HEADSCALE_URL, or run it in headcni-controller's pod")
	}
	api, cred, err := headscale.NewConnector(c.Headscale, os.Getenv).Connect(ctx)
	if err == nil && api == nil {
		err = fmt.Errorf("%s holds a pre-auth key, with which Headscale tells nothing; an API key is needed", cred.Source)
	}
	return api, err
}

func keyJoinedCmd(connect func(context.Context) (*headscale.Client, error)) *cobra.Command {
	return &cobra.Command{
		Use:   "joined",
		Short: "List the keys, and which nodes joined with each",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			api, err := connect(cmd.Context())
			if err != nil {
				return err
			}
			return listJoined(cmd.Context(), api, cmd.OutOrStdout(), time.Now())
		},
	}
}

// listJoined prints the newest keys first, each with the nodes that joined with it.
func listJoined(ctx context.Context, api *headscale.Client, out io.Writer, now time.Time) error {
	keys, nodes, err := joined(ctx, api)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "KEY\tMADE\tENDS\tNODE\tNAME\tJOINED\tSTATE\tAPPROVED ROUTES")
	for _, k := range keys {
		of := nodes[k.ID]
		first := fmt.Sprintf("%s\t%s\t%s", k.ID, when(k.CreatedAt), ends(k, now))
		if len(of) == 0 {
			fmt.Fprintf(w, "%s\t-\t\t\t\t\n", first)
		}
		for _, n := range of {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", first, n.ID, n.Name, when(n.Created), state(n, now), routes(n))
			first = "\t\t"
		}
	}
	return w.Flush()
}

// joined are the keys, the newest first, and the nodes by the number of the key that they joined with. A key that Headscale no longer
// lists has only its number.
func joined(ctx context.Context, api *headscale.Client) (keys []headscale.PreAuthKey, nodes map[headscale.ID][]headscale.Node, err error) {
	if keys, err = api.PreAuthKeys(ctx); err != nil {
		return nil, nil, err
	}
	all, err := api.Nodes(ctx)
	if err != nil {
		return nil, nil, err
	}
	nodes = map[headscale.ID][]headscale.Node{}
	for _, n := range all {
		if n.Key == 0 {
			continue // by a person's login
		}
		nodes[n.Key] = append(nodes[n.Key], n)
		if !slices.ContainsFunc(keys, func(k headscale.PreAuthKey) bool { return k.ID == n.Key }) {
			keys = append(keys, headscale.PreAuthKey{ID: n.Key})
		}
	}
	slices.SortFunc(keys, func(a, b headscale.PreAuthKey) int { return cmp.Compare(b.ID, a.ID) })
	return keys, nodes, nil
}

func when(t time.Time) string {
	if t.IsZero() {
		return "?"
	}
	return t.UTC().Format("2006-01-02T15:04Z")
}

func ends(k headscale.PreAuthKey, now time.Time) string {
	switch {
	case k.CreatedAt.IsZero():
		return "not listed"
	case !k.Expiration.After(now):
		return "has ended"
	}
	return when(k.Expiration)
}

func state(n headscale.Node, now time.Time) string {
	switch {
	case !n.Expiry.IsZero() && n.Expiry.Before(now):
		return "shut out"
	case n.Online:
		return "online"
	}
	return "offline"
}

func routes(n headscale.Node) string {
	var out []string
	for _, r := range n.Approved {
		out = append(out, r.String())
	}
	return strings.Join(out, ",")
}

func keyRevokeCmd(connect func(context.Context) (*headscale.Client, error)) *cobra.Command {
	var withNodes, yes bool
	cmd := &cobra.Command{
		Use:   "revoke KEY",
		Short: "End a key, so that nobody joins with it any more",
		Long: "End a key, so that nobody joins with it any more; headcni-controller makes another within a minute. Nodes that joined with it\n" +
			"stay, unless --nodes removes them from the tailnet too: those of the cluster then join anew, and their pods are cut off from\n" +
			"other nodes for a minute or two.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := strconv.ParseUint(args[0], 10, 64)
			if err != nil || id == 0 {
				return fmt.Errorf("%q is no number of a key: see `headcnictl key joined`", args[0])
			}
			api, err := connect(cmd.Context())
			if err != nil {
				return err
			}
			return revoke(cmd.Context(), api, headscale.ID(id), withNodes, yes, cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&withNodes, "nodes", false, "remove the nodes that joined with it, too")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not only list the nodes that --nodes would remove")
	return cmd
}

// revoke ends a key before it removes nodes, which could join again with it.
func revoke(ctx context.Context, api *headscale.Client, id headscale.ID, withNodes, yes bool, out io.Writer) error {
	keys, nodes, err := joined(ctx, api)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(keys, func(k headscale.PreAuthKey) bool { return k.ID == id })
	if i < 0 {
		return fmt.Errorf("Headscale has no key %s, nor a node that joined with it: see `headcnictl key joined`", id)
	}
	if withNodes && !yes {
		for _, n := range nodes[id] {
			fmt.Fprintf(out, "would remove node %s (%s)\n", n.ID, n.Name)
		}
		return fmt.Errorf("nothing was changed: run it again with --yes to end key %s and remove these nodes", id)
	}
	if !keys[i].CreatedAt.IsZero() {
		if err := api.ExpirePreAuthKey(ctx, keys[i]); err != nil {
			return err
		}
		fmt.Fprintf(out, "key %s has ended\n", id)
	}
	if !withNodes {
		return nil
	}
	var errs []error
	for _, n := range nodes[id] {
		if err := api.DeleteNode(ctx, n); err != nil && !errors.Is(err, headscale.ErrNotFound) {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintf(out, "removed node %s (%s)\n", n.ID, n.Name)
	}
	return errors.Join(errs...)
}
