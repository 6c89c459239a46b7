package daemon

import "net"

// tellSystemd sends a state to the service manager's socket, as sd_notify(3) says; none is no error.
func tellSystemd(socket, state string) error {
	if socket == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte(state))
	return err
}
