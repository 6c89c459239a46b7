package lab

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// mapperProgram maps ports on routers: what OpenWrt has, as Debian has it.
const mapperProgram = "miniupnpd"

const (
	// natpmpPort is where NAT-PMP and PCP are answered, upnpPort where UPnP is, for those who found the router by SSDP.
	natpmpPort, upnpPort = 5351, 5000
	// mapped, mappedIn and mappedOut are the chains that the mapper writes to.
	mapped, mappedIn, mappedOut = "mapped", "mappedin", "mappedout"
)

// mapperChains stand in the router's table. What was translated there no other chain translates.
const mapperChains = "chain " + mapped + " { }\nchain " + mappedIn + " { }\nchain " + mappedOut + " { }\n" +
	"chain mapin { type nat hook prerouting priority -110;\njump " + mappedIn + "\n}\n" +
	"chain mapout { type nat hook postrouting priority 90;\njump " + mappedOut + "\n}\n"

// StartMapper starts what maps the router's ports and waits until it answers.
func (r *Router) StartMapper(ctx context.Context) (err error) {
	lan, natpmp := r.Site.LANAddr(0), r.Site.PortMapping == NATPMP
	word := map[bool]string{true: "yes", false: "no"}
	text := fmt.Sprintf("ext_ifname=%s\nlistening_ip=%s\nhttp_port=%d\nipv6_disable=yes\nsecure_mode=yes\nenable_natpmp=%s\nenable_upnp=%s\n", wanLink, lanLink, upnpPort,
		word[natpmp], word[!natpmp])
	text += fmt.Sprintf("upnp_table_name=router\nupnp_nat_table_name=router\nupnp_forward_chain=%s\nupnp_nat_chain=%s\nupnp_nat_postrouting_chain=%s\n", mapped, mappedIn, mappedOut)
	text += fmt.Sprintf("allow 1024-65535 %s 1024-65535\ndeny 0-65535 0.0.0.0/0 0-65535\n", lan)
	conf := filepath.Join(r.Dir, "miniupnpd.conf")
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return err
	}
	if r.Mapper, err = r.Start(mapperProgram, nil, "-d", "-f", conf, "-P", filepath.Join(r.Dir, "miniupnpd.pid")); err != nil {
		return err
	}
	network, port := "tcp", upnpPort
	if natpmp {
		network, port = "udp", natpmpPort
	}
	return until(ctx, 20*time.Millisecond, r.Mapper, func() error {
		c, err := r.Dial(ctx, network, net.JoinHostPort(r.Site.LANAddr(routerHost).Addr().String(), strconv.Itoa(port)))
		if err != nil {
			return err
		}
		defer c.Close()
		if natpmp { // by UDP only an answer says that somebody is there
			return askNATPMP(c)
		}
		return nil
	})
}

// askNATPMP asks for the router's outside address.
func askNATPMP(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(answerIn)); err != nil {
		return err
	}
	if _, err := c.Write([]byte{0, 0}); err != nil {
		return err
	}
	answer := make([]byte, 12)
	if _, err := io.ReadFull(c, answer); err != nil {
		return err
	}
	if answer[2] != 0 || answer[3] != 0 {
		return fmt.Errorf("it maps no ports: % x", answer)
	}
	return nil
}
