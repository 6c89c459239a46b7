package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/podexec"
)

// apiKeyState is what Headscale says of an API key, without its secret.
type apiKeyState struct {
	// Error is why there is nothing else.
	Error  string    `json:"error,omitempty"`
	Prefix string    `json:"prefix,omitempty"`
	Made   time.Time `json:"made,omitzero"`
	Ends   time.Time `json:"ends,omitzero"`
	// Source is where it is, of the one in use.
	Source string `json:"source,omitempty"`
	key    secret.Secret
	file   string
}

func (k apiKeyState) String() string {
	if k.Error != "" {
		return k.Error
	}
	text := strings.TrimSuffix(k.Prefix, "***") + "..."
	if !k.Ends.IsZero() {
		text += ", ends " + when(k.Ends)
	}
	return text
}

// keyRoom is the one place where the key is used and Headscale is reached: headcni-controller's pod, or this machine.
type keyRoom struct {
	// check asks of a key, the zero Secret: of the one in use.
	check func(context.Context, secret.Secret) (apiKeyState, error)
	// write replaces the one in use, and says where.
	write func(context.Context, secret.Secret) (string, error)
	// join is the key to join with, in Kubernetes; expire ends it.
	join   func(context.Context) (id, ends string, err error)
	expire func(ctx context.Context, id string) (string, error)
	place  string
}

// errNotTaken means that a key was looked at, and will not do.
var errNotTaken = errors.New("the key will not do")

// keyState asks Headscale of a key.
func keyState(ctx context.Context, c config.Headscale, key secret.Secret) (apiKeyState, error) {
	api, err := headscale.New(headscale.Options{URL: c.URL, Key: key, CAFile: c.CAFile, Proxy: c.Proxy})
	if err != nil {
		return apiKeyState{}, err
	}
	kind, err := api.Kind(ctx)
	if errors.Is(err, headscale.ErrUnauthorized) {
		err = fmt.Errorf("%w: %w", errNotTaken, err)
	}
	if err != nil {
		return apiKeyState{}, err
	}
	if kind != headscale.KindAPI {
		return apiKeyState{}, fmt.Errorf("%w: it is a pre-auth key, with which nothing is approved and nothing seen; make an API key with `headscale apikeys create`", errNotTaken)
	}
	own, err := api.OwnAPIKey(ctx)
	if errors.Is(err, headscale.ErrUnauthorized) {
		return apiKeyState{}, fmt.Errorf("%w: %w", errNotTaken, err)
	}
	if err != nil && !errors.Is(err, headscale.ErrNotFound) {
		return apiKeyState{}, err
	}
	return apiKeyState{Prefix: cmp.Or(own.Prefix, "listed nowhere"), Made: own.CreatedAt, Ends: own.Expiration}, nil
}

// inUse asks of the key that daemon.yaml and the environment lead to.
func inUse(ctx context.Context, c config.Headscale) apiKeyState {
	cred, err := c.Credential(os.Getenv)
	if err != nil {
		return apiKeyState{Error: err.Error()}
	}
	k, err := keyState(ctx, c, cred.Key)
	if err != nil {
		k.Error = err.Error()
	}
	k.Source, k.key, k.file = cred.Source, cred.Key, cred.File
	return k
}

// hereRoom is the room of a node without Kubernetes, and of headcni-controller's pod.
func hereRoom(file string) (keyRoom, error) {
	c, err := config.Load(file, file == paths.ConfigFile, os.Environ(), nil)
	if err != nil {
		return keyRoom{}, err
	}
	if c.Headscale.URL == "" {
		return keyRoom{}, errors.New("headscale.url is empty: give --kubeconfig, set HEADCNI_HEADSCALE_URL, or run it where daemon.yaml is")
	}
	return keyRoom{
		place: c.Headscale.URL,
		check: func(ctx context.Context, key secret.Secret) (apiKeyState, error) {
			if key.Empty() {
				return inUse(ctx, c.Headscale), nil
			}
			return keyState(ctx, c.Headscale, key)
		},
		write: func(_ context.Context, key secret.Secret) (string, error) {
			cred, err := c.Headscale.Credential(os.Getenv)
			to := cmp.Or(cred.File, os.Getenv("HEADSCALE_API_KEY_FILE"), c.Headscale.APIKeyFile)
			if to == "" {
				return "", fmt.Errorf("the key is in %s and in no file: set headscale.apiKeyFile to one, and leave the other out", cmp.Or(cred.Source, "no place that is known"))
			}
			if err == nil && cred.File == "" {
				return "", fmt.Errorf("%s holds a key, which counts before that in %s: leave it out", cred.Source, to)
			}
			return to, atomicfile.Write(to, []byte(key.Reveal()+"\n"), 0o600)
		},
	}, nil
}

// clusterRoom is headcni-controller's pod, asked from afar.
func clusterRoom(ctx context.Context, l looker) (keyRoom, error) {
	client, ns := l.cluster.Client, l.cluster.Namespace
	list, err := client.Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: doctor.Labels + ",app.kubernetes.io/component=controller"})
	if err != nil {
		return keyRoom{}, fmt.Errorf("list headcni-controller's pods in namespace %s: %w", ns, err)
	}
	var pod *corev1.Pod
	for i, p := range list.Items {
		if p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil {
			pod = &list.Items[i]
		}
	}
	if pod == nil {
		return keyRoom{}, fmt.Errorf("no pod of headcni-controller runs in namespace %s, in which keys are checked: see `kubectl -n %[1]s describe deploy headcni-controller`", ns)
	}
	name := kube.AuthSecret
	for _, v := range pod.Spec.Volumes {
		if v.Name == "auth" && v.Secret != nil {
			name = v.Secret.SecretName
		}
	}
	run := func(ctx context.Context, stdin []byte, args ...string) ([]byte, error) {
		ctx, cancel := context.WithTimeout(ctx, l.cluster.Timeout)
		defer cancel()
		out, err := podexec.Feed(ctx, l.config, podexec.Pod{Namespace: ns, Name: pod.Name, Container: "headcni-controller"}, stdin,
			append([]string{"/usr/local/bin/headcnictl", "key"}, args...)...)
		var exit podexec.Exit
		switch {
		case errors.As(err, &exit):
			text := strings.TrimPrefix(exit.Stderr, "headcnictl: ")
			if err = errors.New(text); exit.Code == int(notRight) {
				err = fmt.Errorf("%w: %s", errNotTaken, strings.TrimPrefix(text, errNotTaken.Error()+": "))
			}
		case errors.Is(err, podexec.ErrForbidden):
			err = fmt.Errorf("%w; it needs the right to create pods/exec in namespace %s", err, ns)
		}
		return out, err
	}
	secrets := client.Secrets(ns)
	return keyRoom{
		place: "Secret " + ns + "/" + name,
		check: func(ctx context.Context, key secret.Secret) (k apiKeyState, err error) {
			out, err := run(ctx, []byte(key.Reveal()), "check")
			if err == nil {
				err = json.Unmarshal(out, &k)
			}
			return k, err
		},
		write: func(ctx context.Context, key secret.Secret) (string, error) {
			patch, err := json.Marshal(map[string]any{"data": map[string][]byte{kube.AuthSecretKey: []byte(key.Reveal())}})
			if err == nil {
				_, err = secrets.Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{})
			}
			if apierrors.IsForbidden(err) {
				err = fmt.Errorf("%w; it needs the right to patch the Secret %s", err, name)
			}
			return "Secret " + ns + "/" + name, err
		},
		join: func(ctx context.Context) (id, ends string, err error) {
			s, err := secrets.Get(ctx, kube.JoinSecret, metav1.GetOptions{})
			if err != nil {
				return "", "", fmt.Errorf("look at the join key: %w", err)
			}
			return s.Annotations[kube.JoinID], s.Annotations[kube.JoinExpires], nil
		},
		expire: func(ctx context.Context, id string) (string, error) {
			out, err := run(ctx, nil, "revoke", id)
			return strings.TrimSpace(string(out)), err
		},
	}, nil
}

// keyCheckCmd runs in headcni-controller's pod: the key comes by standard input, where nobody else sees it.
func keyCheckCmd(file *string) *cobra.Command {
	return &cobra.Command{
		Use: "check", Hidden: true, Args: cobra.NoArgs, Short: "Print what Headscale says of the key on standard input, or, without, of the one in use",
		RunE: func(cmd *cobra.Command, _ []string) error {
			room, err := hereRoom(*file)
			if err != nil {
				return err
			}
			b, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), maxKeyFile))
			if err != nil {
				return err
			}
			k, err := room.check(cmd.Context(), secret.New(strings.TrimSpace(string(b))))
			if errors.Is(err, errNotTaken) {
				return err
			}
			if err != nil {
				return fail(cmd, err)
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(k)
		},
	}
}

// maxKeyFile bounds a file that holds a key, in bytes.
const maxKeyFile = 4096

// readKeyFile reads a file that holds a key alone; - is standard input.
func readKeyFile(in io.Reader, path string) (secret.Secret, error) {
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return secret.Secret{}, err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxKeyFile+1))
	if err != nil {
		return secret.Secret{}, err
	}
	b = bytes.TrimSpace(b)
	if len(b) == 0 || len(b) > maxKeyFile || bytes.ContainsAny(b, " \t\r\n") {
		return secret.Secret{}, fmt.Errorf("%s must hold the key alone, one word", path)
	}
	return secret.New(string(b)), nil
}

func (f *lookFlags) keyRoom(ctx context.Context, file string) (keyRoom, error) {
	l, err := f.looker()
	if err != nil {
		return keyRoom{}, err
	}
	if l.cluster == nil {
		return hereRoom(file)
	}
	return clusterRoom(ctx, l)
}

func (f *lookFlags) addKey(cmd *cobra.Command) {
	cmd.Args = cobra.NoArgs
	f.addWhere(cmd)
	cmd.Flags().StringVarP(&f.namespace, "namespace", "n", kube.DefaultNamespace, "where HeadCNI is installed")
}

const keyHow = "With a kubeconfig it asks in headcni-controller's pod, which reaches Headscale: who runs it must be allowed to list pods and create pods/exec in the\n" +
	"namespace of HeadCNI, "

func keyShowCmd(file *string) *cobra.Command {
	f := &lookFlags{output: "text"}
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Show the API key and the join key, without their secrets: when each ends, and who holds it",
		Long: "Show the API key and the join key, without their secrets: when each ends, and who holds it.\n\n" + keyHow + "and to get the Secret headcni-join.\n\n" +
			"Exit code 0: both are right; 1: the API key is refused, or ends within two weeks; 2: could not look.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			room, err := f.keyRoom(cmd.Context(), *file)
			if err != nil {
				return fail(cmd, err)
			}
			return showKeys(cmd, room, time.Now())
		},
	}
	f.addKey(cmd)
	return cmd
}

func showKeys(cmd *cobra.Command, room keyRoom, now time.Time) error {
	k, err := room.check(cmd.Context(), secret.Secret{})
	if err != nil {
		return fail(cmd, err)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
	holder := "in " + cmp.Or(k.file, k.Source)
	if room.join != nil {
		holder = "in " + room.place + ", read by headcni-controller alone"
	}
	fmt.Fprintf(w, "API key\t%s\t%s\n", k, holder)
	if room.join != nil {
		id, ends, err := room.join(cmd.Context())
		if err != nil {
			return fail(cmd, err)
		}
		text := "made by nobody yet"
		if id != "" {
			text = "number " + id + ", ends " + ends
		}
		fmt.Fprintf(w, "join key\t%s\t%s\n", text, "in Secret "+kube.JoinSecret+", made by headcni-controller, read by every node's daemon")
	}
	if err := w.Flush(); err != nil {
		return fail(cmd, err)
	}
	if k.Error != "" || !k.Ends.IsZero() && k.Ends.Sub(now) < headscale.APIKeyWarning {
		fmt.Fprintln(cmd.OutOrStdout(), "\ndo   `headscale apikeys create`, its output into a file, `headcnictl key rotate --from-file FILE`")
		return notRight
	}
	return nil
}

func keyRotateCmd(file *string) *cobra.Command {
	f := &lookFlags{output: "text"}
	var from string
	var join bool
	cmd := &cobra.Command{
		Use:   "rotate --from-file FILE | --join",
		Short: "Put another API key in the place of the one in use, when Headscale takes it; or have another join key made",
		Long: "Put the API key in FILE (- is standard input) in the place of the one in use, when Headscale takes it: into the Secret that headcni-controller reads,\n" +
			"or, without Kubernetes, into the file that headscale.apiKeyFile names. Nothing is restarted: it is picked up within two minutes. With --join the\n" +
			"key that nodes join with ends, and headcni-controller makes another within a minute; nodes that are in the tailnet stay.\n\n" +
			"  headscale apikeys create --expiration 365d > api-key\n" +
			"  headcnictl key rotate --from-file api-key\n\n" + keyHow + "and to patch the Secret, by default headcni-auth; for --join to get the Secret headcni-join.\n\n" +
			"Exit code 0: done; 1: Headscale does not take the key, and nothing was changed; 2: could not look.",
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if join == (from != "") {
				return fail(cmd, errors.New("give --from-file FILE, with a new API key, or --join"))
			}
			var key secret.Secret
			var err error
			if !join {
				if key, err = readKeyFile(cmd.InOrStdin(), from); err != nil {
					return fail(cmd, err)
				}
			}
			room, err := f.keyRoom(cmd.Context(), *file)
			if err != nil {
				return fail(cmd, err)
			}
			if join {
				return rotateJoin(cmd, room)
			}
			return rotate(cmd, room, key)
		},
	}
	f.addKey(cmd)
	cmd.Flags().StringVar(&from, "from-file", "", "a file that holds the new API key alone; - for standard input")
	cmd.Flags().BoolVar(&join, "join", false, "end the key that nodes join with, so that another is made")
	return cmd
}

// rotate checks the new key before it writes it: with one that is refused nobody would join any more.
func rotate(cmd *cobra.Command, room keyRoom, key secret.Secret) error {
	ctx, out := cmd.Context(), cmd.OutOrStdout()
	next, err := room.check(ctx, key)
	switch {
	case errors.Is(err, errNotTaken):
		cmd.PrintErrf("headcnictl: nothing was changed: %v\n", err)
		return notRight
	case err != nil:
		return fail(cmd, fmt.Errorf("nothing was changed: %w", err))
	}
	was, err := room.check(ctx, secret.Secret{})
	if err != nil {
		return fail(cmd, err)
	}
	fmt.Fprintf(out, "old API key   %s\nnew API key   %s\n", was, next)
	// Also where both are the same: a pod's file is behind its Secret, for up to two minutes.
	to, err := room.write(ctx, key)
	if err != nil {
		return fail(cmd, err)
	}
	fmt.Fprintf(out, "written to %s; it is picked up within two minutes: `headcnictl status`\n", to)
	if was.Error == "" && was.Prefix != next.Prefix {
		fmt.Fprintf(out, "then end the old one: `headscale apikeys expire --prefix %s`\n", strings.TrimPrefix(strings.TrimSuffix(strings.TrimSuffix(was.Prefix, "***"), "-"), "hskey-api-"))
	}
	return nil
}

func rotateJoin(cmd *cobra.Command, room keyRoom) error {
	if room.join == nil {
		return fail(cmd, errors.New("without Kubernetes there is no join key: each daemon makes itself one when it joins"))
	}
	id, _, err := room.join(cmd.Context())
	if err == nil && id == "" {
		err = errors.New("headcni-controller has made no join key")
	}
	if err != nil {
		return fail(cmd, err)
	}
	text, err := room.expire(cmd.Context(), id)
	if err != nil {
		return fail(cmd, err)
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s; headcni-controller makes another within a minute: `headcnictl key show`\n", text)
	return nil
}
