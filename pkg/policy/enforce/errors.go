package enforce

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfcmd"
)

// explain says what to do about an error of nft or of the kernel.
func explain(err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%w: the kernel may lack a part: load the modules nf_tables, nf_conntrack, nft_ct, nft_reject_inet and nft_log", err)
	}
	return nfcmd.Explain(err)
}
