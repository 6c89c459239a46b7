package lab

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"strings"

	"github.com/headcni/headcni/pkg/config/paths"
)

// behindSocket is where a daemon-mode tailscaled listens whose LocalAPI has something of the lab's before it.
const behindSocket = paths.DaemonTailscaleSocket + ".behind"

// refusePings puts a proxy before the LocalAPI of the node's tailscaled that passes everything on but pings. It stays over
// restarts of tailscaled.
func (n *Node) refusePings() error {
	if n.front != nil {
		return nil
	}
	if err := os.MkdirAll(n.Path(paths.RunDir), 0o755); err != nil {
		return err
	}
	var l *net.UnixListener
	mnt := namespaces{mnt: n.ns.mnt}
	err := mnt.do(func() (err error) {
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: paths.DaemonTailscaleSocket, Net: "unix"})
		return err
	})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false) // the path is the node's
	pass := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "http", r.In.Host, r.In.Host
		},
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dial(ctx, mnt, "unix", behindSocket)
		}, DisableKeepAlives: true},
		FlushInterval: -1,                         // the bus
		ErrorLog:      log.New(io.Discard, "", 0), // a tailscaled that is not up yet
	}
	n.front = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/ping") || strings.HasSuffix(r.URL.Path, "/debug") {
			http.Error(w, "the lab refuses pings", http.StatusForbidden)
			return
		}
		pass.ServeHTTP(w, r)
	})}
	go n.front.Serve(l) // until unplug
	return nil
}
