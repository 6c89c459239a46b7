package lab

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// proxyProgram is the HTTP proxy of routers: a small one that Debian has.
const proxyProgram = "tinyproxy"

// proxy is the URL of the node's HTTP proxy, "" where it has none.
func (n *Node) proxy() string {
	if len(n.Routers) == 0 || !n.Routers[0].Site.Proxy {
		return ""
	}
	return "http://" + n.Routers[0].proxyAddr()
}

func (r *Router) proxyAddr() string {
	return net.JoinHostPort(r.Site.LANAddr(routerHost).Addr().String(), strconv.Itoa(proxyPort))
}

// StartProxy starts the router's HTTP proxy and waits until it listens.
func (r *Router) StartProxy(ctx context.Context) (err error) {
	conf := filepath.Join(r.Dir, "tinyproxy.conf")
	text := fmt.Sprintf("Port %d\nListen %s\nConnectPort %d\nTimeout 600\nMaxClients 100\nLogLevel Connect\n", proxyPort, r.Site.LANAddr(routerHost).Addr(), tlsPort)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return err
	}
	if r.Proxy, err = r.Start(proxyProgram, nil, "-d", "-c", conf); err != nil {
		return err
	}
	return until(ctx, 20*time.Millisecond, r.Proxy, func() error {
		c, err := r.Dial(ctx, "tcp", r.proxyAddr())
		if err != nil {
			return err
		}
		return c.Close()
	})
}
