package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/internal/procfs"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/watch"
)

// savedVersion is that of the file. One of another version is not read.
const savedVersion = 1

const (
	// saveEvery is how long after one writing of the file the next is due at the earliest, and saveShare how many times as long as the
	// writing took: a large cluster changes all the time.
	saveEvery = time.Second
	saveShare = 100
)

// saved is the last snapshot, for a start without the API server.
type saved struct {
	Version    int                           `json:"version"`
	Boot       string                        `json:"boot"`
	Node       string                        `json:"node"`
	Pods       []*policy.Pod                 `json:"pods"`
	Static     map[types.UID]types.UID       `json:"static,omitempty"`
	Namespaces []policy.Namespace            `json:"namespaces"`
	Policies   []*networkingv1.NetworkPolicy `json:"policies"`
	Nodes      []policy.Node                 `json:"nodes"`
	PodCIDRs   []netip.Prefix                `json:"podCIDRs"`
}

// load returns what is kept of a node, nil where that is nothing. Of an earlier boot other nodes' pods are left out: their addresses may
// be others' by now, which would have rights that are not theirs.
func load(file, node, boot string) (*watch.Cluster, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var s saved
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	if s.Version != savedVersion || s.Node != node {
		return nil, nil
	}
	if boot == "" || boot != s.Boot {
		s.Pods = slices.DeleteFunc(s.Pods, func(p *policy.Pod) bool { return p.Node != node })
	}
	return &watch.Cluster{Static: s.Static, Snapshot: &policy.Snapshot{
		Node: node, Pods: s.Pods, Namespaces: s.Namespaces, Policies: s.Policies, Nodes: s.Nodes, PodCIDRs: s.PodCIDRs,
	}}, nil
}

// saver writes the file beside the loop, which does not wait for a disk.
type saver struct {
	file string
	log  *slog.Logger

	running sync.WaitGroup
	stop    chan struct{}

	mu   sync.Mutex
	next *saved // what is to be written, nil where it has been
	busy bool
	err  error
}

// save has a snapshot kept soon.
func (s *saver) save(snapshot *policy.Snapshot, static map[types.UID]types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next = &saved{
		Version: savedVersion, Node: snapshot.Node, Pods: snapshot.Pods, Static: static, Namespaces: snapshot.Namespaces,
		Policies: snapshot.Policies, Nodes: snapshot.Nodes, PodCIDRs: snapshot.PodCIDRs,
	}
	if !s.busy {
		s.busy = true
		s.running.Go(s.write)
	}
}

// write goes on until there is nothing more to write.
func (s *saver) write() {
	for {
		s.mu.Lock()
		next := s.next
		s.next = nil
		s.busy = next != nil
		s.mu.Unlock()
		if next == nil {
			return
		}
		began := time.Now()
		s.wrote(next.write(s.file))
		select {
		case <-s.stop:
		case <-time.After(max(saveEvery, saveShare*time.Since(began))):
		}
	}
}

func (s *saver) wrote(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil && s.err == nil {
		s.log.Warn("keep what policies depend on: a start without the API server will know nothing of it", "err", err)
	}
	s.err = err
}

func (s *saved) write(file string) error {
	boot, err := procfs.Read(paths.BootID)
	if err != nil {
		return err
	}
	s.Boot = boot
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return atomicfile.Write(file, b, 0o600)
}

// end writes what is left and waits for it.
func (s *saver) end() {
	close(s.stop)
	s.running.Wait()
}
