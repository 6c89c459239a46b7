package agent

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
const savedVersion = 2

const (
	// saveEvery is how long after one writing of the file the next is due at the earliest, and saveShare how many times as long as the
	// writing took: a large cluster changes all the time.
	saveEvery = time.Second
	saveShare = 100
)

// saved is the last snapshot, for a start without the API server. In the file its pods and policies follow it one by one: a large cluster
// need not be in memory twice.
type saved struct {
	savedHead
	pods     []*policy.Pod
	policies []*networkingv1.NetworkPolicy
}

type savedHead struct {
	Version    int                     `json:"version"`
	Boot       string                  `json:"boot"`
	Node       string                  `json:"node"`
	Static     map[types.UID]types.UID `json:"static,omitempty"`
	Namespaces []policy.Namespace      `json:"namespaces"`
	Nodes      []policy.Node           `json:"nodes"`
	PodCIDRs   []netip.Prefix          `json:"podCIDRs"`
	// Pods and Policies are how many follow. A file that has fewer is not read: without a policy a pod has rights that are not its own.
	Pods     int `json:"podCount"`
	Policies int `json:"policyCount"`
}

// load returns what is kept of a node, nil where that is nothing. Of an earlier boot other nodes' pods are left out: their addresses may
// be others' by now, which would have rights that are not theirs.
func load(file, node, boot string) (*watch.Cluster, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var s saved
	d := json.NewDecoder(f)
	if err := d.Decode(&s.savedHead); err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	if s.Version != savedVersion || s.Node != node {
		return nil, nil
	}
	if s.pods, err = decode[policy.Pod](d, s.Pods); err == nil {
		s.policies, err = decode[networkingv1.NetworkPolicy](d, s.Policies)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	if boot == "" || boot != s.Boot {
		s.pods = slices.DeleteFunc(s.pods, func(p *policy.Pod) bool { return p.Node != node })
	}
	return &watch.Cluster{Static: s.Static, Snapshot: &policy.Snapshot{
		Node: node, Pods: s.pods, Namespaces: s.Namespaces, Policies: s.policies, Nodes: s.Nodes, PodCIDRs: s.PodCIDRs,
	}}, nil
}

// decode reads n values.
func decode[T any](d *json.Decoder, n int) (all []*T, err error) {
	for range n {
		v := new(T)
		if err := d.Decode(v); err != nil {
			return nil, fmt.Errorf("%d of %d %T: %w", len(all), n, *v, err)
		}
		all = append(all, v)
	}
	return all, nil
}

// saver writes the file beside the loop, which does not wait for a disk.
type saver struct {
	file string
	// note is there in this boot while the file has what the kernel was made to hold, or will be.
	note string
	log  *slog.Logger

	running sync.WaitGroup
	stop    chan struct{}

	mu    sync.Mutex
	next  *saved // what is to be written, nil where it has been
	ahead bool   // the kernel may hold what save was not called for yet
	busy  bool
	err   error
}

// begin is called before the kernel is made to hold something else than the file has: whoever is killed from now on leaves a file that is
// behind, until save has written it.
func (s *saver) begin() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead = true
	return atomicfile.Remove(s.note)
}

// current notes that the kernel was made to hold what the file has.
func (s *saver) current() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead = false
	s.tell()
}

// tell needs the lock. Where the note cannot be written, as in a full /run, the file counts as behind.
func (s *saver) tell() {
	if err := atomicfile.WriteUnsynced(s.note, nil, 0o600); err != nil {
		s.log.Warn("note that what policies depend on is kept: a start without the API server will not go by it", "err", err)
	}
}

// behind: the kernel was made to hold more than the file has.
func (s *saver) behind() bool {
	_, err := os.Lstat(s.note)
	return err != nil
}

// save has a snapshot kept soon.
func (s *saver) save(snapshot *policy.Snapshot, static map[types.UID]types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead = false
	s.next = &saved{pods: snapshot.Pods, policies: snapshot.Policies, savedHead: savedHead{
		Version: savedVersion, Node: snapshot.Node, Static: static, Namespaces: snapshot.Namespaces, Nodes: snapshot.Nodes,
		PodCIDRs: snapshot.PodCIDRs, Pods: len(snapshot.Pods), Policies: len(snapshot.Policies),
	}}
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
		err := next.write(s.file)
		s.wrote(next, err)
		wait := max(saveEvery, saveShare*time.Since(began))
		if err != nil {
			wait = retryMax
		}
		select {
		case <-s.stop:
			if err != nil {
				return
			}
		case <-time.After(wait):
		}
	}
}

func (s *saver) wrote(what *saved, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil && s.next == nil && !s.ahead:
		s.tell()
	case err != nil && s.next == nil:
		s.next = what // there may be room later, and no change until then
	}
	if err != nil && s.err == nil {
		s.log.Warn("keep what policies depend on: a start without the API server will know nothing of it; make room on the file system of "+s.file, "err", err)
	}
	s.err = err
}

func (s *saved) write(file string) error {
	boot, err := procfs.Read(paths.BootID)
	if err != nil {
		return err
	}
	s.Boot = boot
	return atomicfile.Stream(file, 0o600, func(w io.Writer) error {
		buffered := bufio.NewWriter(w)
		e := json.NewEncoder(buffered)
		if err := e.Encode(s.savedHead); err != nil {
			return err
		}
		for _, p := range s.pods {
			if err := e.Encode(p); err != nil {
				return err
			}
		}
		for _, p := range s.policies {
			if err := e.Encode(p); err != nil {
				return err
			}
		}
		return buffered.Flush()
	})
}

// end writes what is left and waits for it.
func (s *saver) end() {
	close(s.stop)
	s.running.Wait()
}
