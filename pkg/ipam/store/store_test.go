package store

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const testBoot = "11111111-2222-3333-4444-555555555555"

func newStore(t *testing.T) *Store {
	t.Helper()
	return storeIn(t, filepath.Join(t.TempDir(), "data", "net"), testBoot)
}

func storeIn(t *testing.T, dir, boot string) *Store {
	t.Helper()
	s, err := New(dir, Options{BootID: boot})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, s *Store, l Lease) {
	t.Helper()
	if err := s.Update(context.Background(), func(tx *Tx) error { return tx.Put(l) }); err != nil {
		t.Fatal(err)
	}
}

// indexed makes sure that there is an index for the address's window.
func indexed(t *testing.T, s *Store, addr string) {
	t.Helper()
	window, _ := Locate(netip.MustParseAddr(addr))
	err := s.Update(context.Background(), func(tx *Tx) error { _, err := tx.Bitmap(window); return err })
	if err != nil {
		t.Fatal(err)
	}
}

func find(s *Store, id string) (e Entry, err error) {
	err = s.View(func(tx *Tx) error { e, err = tx.Find(id, "eth0"); return err })
	return e, err
}

func remove(s *Store, id string) error {
	return s.Edit(context.Background(), func(tx *Tx) error {
		e, err := tx.Find(id, "eth0")
		if err != nil {
			return err
		}
		return tx.Delete(e)
	})
}

// problems lists what Check finds as "kind path".
func problems(t *testing.T, s *Store, repair bool) []string {
	t.Helper()
	found, err := s.Check(context.Background(), repair)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, p := range found {
		if repair && !p.Repaired {
			t.Errorf("not repaired: %+v", p)
		}
		out = append(out, p.Kind+" "+p.Path)
	}
	return out
}

func boot(s *Store, name string) string { return filepath.Join(s.dir, s.bootID, name) }

func TestPutFindDelete(t *testing.T) {
	s := newStore(t)
	if _, err := find(s, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("find where there is no store: %v", err)
	}
	if err := remove(s, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("remove where there is no store: %v", err)
	}
	if _, err := os.Stat(s.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("looking left a trace: %v", err)
	}
	indexed(t, s, "10.0.0.2")
	want := testLease("a", "10.0.0.2/24", "fd00::2/64")
	put(t, s, want)
	e, err := find(s, "a")
	if err != nil || !e.Whole {
		t.Fatalf("find: %v, whole %v", err, e.Whole)
	}
	if diff := cmp.Diff(want, e.Lease, cmpAddr); diff != "" {
		t.Error(diff)
	}
	for _, l := range []Lease{testLease("a", "10.0.0.3/24"), testLease("b", "10.0.0.3/24", "10.0.0.2/24")} {
		err := s.Update(context.Background(), func(tx *Tx) error { return tx.Put(l) })
		if !errors.Is(err, ErrTaken) {
			t.Errorf("put %s %v: %v, want ErrTaken", l.ContainerID, l.Addrs, err)
		}
	}
	if got := problems(t, s, false); got != nil {
		t.Errorf("a refused Put left %v", got)
	}
	put(t, s, testLease("b", "10.0.0.3/24"))
	for range 2 {
		err = remove(s, "a")
	}
	if !errors.Is(err, ErrNotFound) {
		t.Errorf("second removal: %v", err)
	}
	put(t, s, testLease("c", "10.0.0.2/24", "fd00::2/64"))
	if got := problems(t, s, false); got != nil {
		t.Error(got)
	}
}

func TestListableByAPerson(t *testing.T) {
	s := newStore(t)
	indexed(t, s, "10.0.0.2")
	put(t, s, testLease("a", "10.0.0.2/24"))
	var files []string
	err := filepath.WalkDir(s.dir, func(path string, d os.DirEntry, err error) error {
		rel, _ := filepath.Rel(s.dir, path)
		files = append(files, d.Type().String()+" "+rel)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"d--------- .", "d--------- " + testBoot, "d--------- " + testBoot + "/addresses", "---------- " + testBoot + "/addresses/10.0.0.2",
		"d--------- " + testBoot + "/index", "---------- " + testBoot + "/index/10.0.0.0-12", "---------- " + testBoot + "/layout",
		"d--------- " + testBoot + "/leases", "---------- " + testBoot + "/leases/a:eth0", "---------- lock",
	}
	if diff := cmp.Diff(want, files); diff != "" {
		t.Error(diff)
	}
	if st, err := os.Stat(s.dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the folder is open to others, who could hold the lock: %v, %v", st.Mode(), err)
	}
}

func TestNewBootStartsEmpty(t *testing.T) {
	old := newStore(t)
	put(t, old, testLease("a", "10.0.0.2/24"))
	foreign := filepath.Join(old.dir, "10.9.9.9")
	if err := os.WriteFile(foreign, []byte("of host-local"), 0o644); err != nil {
		t.Fatal(err)
	}
	now := storeIn(t, old.dir, "99999999-2222-3333-4444-555555555555")
	if _, err := find(now, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a lease of the earlier boot: %v", err)
	}
	put(t, now, testLease("b", "10.0.0.2/24"))
	if _, err := os.Stat(filepath.Join(old.dir, testBoot)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the earlier boot's folder: %v", err)
	}
	if _, err := os.Stat(foreign); err != nil {
		t.Errorf("a foreign file went too: %v", err)
	}
}

func TestLockNamesItsHolder(t *testing.T) {
	s := newStore(t)
	put(t, s, testLease("a", "10.0.0.2/24"))
	s.timeout = 50 * time.Millisecond
	err := s.Edit(context.Background(), func(*Tx) error {
		start := time.Now()
		err := s.Edit(context.Background(), func(*Tx) error { return nil })
		if d := time.Since(start); d < s.timeout || d > 5*time.Second {
			t.Errorf("gave up after %s, want %s", d, s.timeout)
		}
		return err
	})
	if want := fmt.Sprintf("pid %d (", os.Getpid()); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want ErrLocked by %q", err, want)
	}
	// The one who gave up must not keep the lock that came to it later.
	for range 20 {
		if err = s.Edit(context.Background(), func(*Tx) error { return nil }); err == nil {
			return
		}
	}
	t.Error("the lock never came back:", err)
}

func TestLockWaitsAndCancels(t *testing.T) {
	s := newStore(t)
	put(t, s, testLease("a", "10.0.0.2/24"))
	hold, released := make(chan struct{}), make(chan error, 1)
	held := make(chan struct{})
	go func() {
		released <- s.Edit(context.Background(), func(*Tx) error { close(held); <-hold; return nil })
	}()
	<-held
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Edit(ctx, func(*Tx) error { return nil }); !errors.Is(err, ErrLocked) {
		t.Errorf("cancelled wait: %v", err)
	}
	time.AfterFunc(20*time.Millisecond, func() { close(hold) })
	if err := s.Edit(context.Background(), func(*Tx) error { return nil }); err != nil {
		t.Errorf("patient wait: %v", err)
	}
	if err := <-released; err != nil {
		t.Error(err)
	}
}

// A lock on a file that was removed protects nothing.
func TestLockFileRemovedWhileWaiting(t *testing.T) {
	s := newStore(t)
	put(t, s, testLease("a", "10.0.0.2/24"))
	waiting := make(chan error, 1)
	err := s.Edit(context.Background(), func(*Tx) error {
		go func() {
			waiting <- s.Edit(context.Background(), func(tx *Tx) error {
				mine, err1 := s.fs.Stat(tx.locked, "")
				now, err2 := s.fs.Stat(tx.net, lockName)
				if !mine.sameFile(now) {
					t.Error("the lock that is held is not the one that others will take")
				}
				return errors.Join(err1, err2)
			})
		}()
		time.Sleep(30 * time.Millisecond)
		return os.Remove(filepath.Join(s.dir, lockName))
	})
	if err := errors.Join(err, <-waiting); err != nil {
		t.Error(err)
	}
}

func TestFlockHolder(t *testing.T) {
	for line, want := range map[string]int{
		"5: FLOCK  ADVISORY  WRITE 4711 fe:00:131090 0 EOF":    4711,
		"5: -> FLOCK  ADVISORY  WRITE 4712 fe:00:131090 0 EOF": 0,
		"6: POSIX  ADVISORY  WRITE 4713 fe:00:131090 0 EOF":    0,
		"7: FLOCK  ADVISORY  WRITE 4714 fe:00:131091 0 EOF":    0,
		"8: FLOCK": 0,
		"":         0,
	} {
		if pid, ok := flockHolder(line, 131090); pid != want && (ok || want != 0) {
			t.Errorf("%q: %d, %v, want %d", line, pid, ok, want)
		}
	}
}

func TestCorruptIsSaidAndRebuilt(t *testing.T) {
	for name, damage := range map[string]func(s *Store) error{
		"layout missing":   func(s *Store) error { return os.Remove(boot(s, layoutName)) },
		"layout truncated": func(s *Store) error { return os.Truncate(boot(s, layoutName), 0) },
		"layout newer":     func(s *Store) error { return os.WriteFile(boot(s, layoutName), []byte("headcni-ipam 2\n"), 0o600) },
		"no leases":        func(s *Store) error { return os.RemoveAll(boot(s, leaseDir)) },
		"no addresses":     func(s *Store) error { return os.RemoveAll(boot(s, addressDir)) },
		"a file": func(s *Store) error {
			return errors.Join(os.RemoveAll(boot(s, "")), os.WriteFile(boot(s, ""), nil, 0o600))
		},
		"a link": func(s *Store) error {
			return errors.Join(os.RemoveAll(boot(s, "")), os.Symlink("/etc", filepath.Clean(boot(s, ""))))
		},
		"rebuild cut off": func(s *Store) error {
			return os.Rename(filepath.Join(s.dir, testBoot), filepath.Join(s.dir, testBoot+asideMark+"x"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			mine, other := testLease("dead", "10.0.0.9/24"), testLease("other", "10.0.0.4/24")
			other.Writer = "somebody"
			put(t, s, mine)
			put(t, s, other)
			if err := damage(s); err != nil {
				t.Fatal(err)
			}
			for range 2 { // asking does not change the answer
				err := s.Update(context.Background(), func(*Tx) error { return nil })
				if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), s.dir) {
					t.Fatalf("%v, want ErrCorrupt with the path", err)
				}
				if ready := s.Ready(context.Background()); !errors.Is(ready, ErrCorrupt) {
					t.Fatalf("ready: %v", ready)
				}
			}
			live := testLease("live", "10.0.0.2/24", "fd00::2/64")
			aside, err := s.Rebuild(context.Background(), "test", []Lease{live})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Lstat(aside); err != nil || !strings.Contains(aside, asideMark) {
				t.Errorf("set aside as %q: %v", aside, err)
			}
			if e, err := find(s, "live"); err != nil || !e.Whole {
				t.Errorf("live lease: %v", err)
			}
			if _, err := find(s, "dead"); !errors.Is(err, ErrNotFound) {
				t.Errorf("dead lease: %v", err)
			}
			if _, err := find(s, "other"); err != nil && name != "no leases" && !strings.HasPrefix(name, "a ") {
				t.Errorf("another writer's lease: %v", err)
			}
			if again, err := s.Rebuild(context.Background(), "test", nil); again != "" || err != nil {
				t.Errorf("rebuild of a sound store: %q, %v", again, err)
			}
			if got := problems(t, s, false); got != nil {
				t.Error(got)
			}
		})
	}
}

func TestCheckFindsAndRepairs(t *testing.T) {
	a, b := "leases/a:eth0", "addresses/10.0.0.2"
	for name, c := range map[string]struct {
		damage func(s *Store) error
		want   []string
		after  string // addresses of a after the repair; "" = no lease
	}{
		"nothing": {func(*Store) error { return nil }, nil, "10.0.0.2 fd00::2"},
		"record truncated": {func(s *Store) error { return os.Truncate(boot(s, a), 10) },
			[]string{"record " + a}, "10.0.0.2 fd00::2"},
		"record removed": {func(s *Store) error { return os.Remove(boot(s, a)) },
			[]string{"record " + a}, "10.0.0.2 fd00::2"},
		"address removed": {func(s *Store) error { return os.Remove(boot(s, b)) },
			[]string{"leftover " + a, "index index/10.0.0.0-12"}, "10.0.0.2 fd00::2"},
		"empty leftover": {func(s *Store) error { return os.WriteFile(boot(s, "leases/x:eth0"), nil, 0o600) },
			[]string{"leftover leases/x:eth0"}, "10.0.0.2 fd00::2"},
		"junk address": {func(s *Store) error { return os.WriteFile(boot(s, "addresses/10.0.0.9"), []byte("?"), 0o600) },
			[]string{"address addresses/10.0.0.9", "index index/10.0.0.0-12"}, "10.0.0.2 fd00::2"},
		"stale address": {func(s *Store) error {
			return errors.Join(os.Remove(boot(s, a)), putAgain(s))
		}, []string{"address " + b, "address addresses/fd00::2"}, "10.0.0.20"},
		"index junk": {func(s *Store) error { return os.WriteFile(boot(s, "index/10.0.0.0-12"), []byte("junk"), 0o600) },
			[]string{"index index/10.0.0.0-12"}, "10.0.0.2 fd00::2"},
		"index bit": {func(s *Store) error { return flip(boot(s, "index/10.0.0.0-12"), indexData) },
			[]string{"index index/10.0.0.0-12"}, "10.0.0.2 fd00::2"},
		"index name": {func(s *Store) error { return os.WriteFile(boot(s, "index/what"), nil, 0o600) },
			[]string{"foreign index/what"}, "10.0.0.2 fd00::2"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			indexed(t, s, "10.0.0.2")
			put(t, s, testLease("a", "10.0.0.2/24", "fd00::2/64"))
			put(t, s, testLease("b", "10.0.0.3/24", "fd00::3/64"))
			if err := c.damage(s); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, problems(t, s, false)); diff != "" {
				t.Error(diff)
			}
			problems(t, s, true)
			if got := problems(t, s, false); got != nil {
				t.Errorf("after the repair: %v", got)
			}
			e, err := find(s, "a")
			var addrs []string
			for _, a := range e.Addrs {
				addrs = append(addrs, a.Addr.Addr().String())
			}
			if got := strings.Join(addrs, " "); got != c.after || err != nil || !e.Whole {
				t.Errorf("a holds %q, want %q; whole %v; %v", got, c.after, e.Whole, err)
			}
			if e, err := find(s, "b"); err != nil || !e.Whole {
				t.Errorf("b: %v", err)
			}
		})
	}
}

func putAgain(s *Store) error {
	return s.Update(context.Background(), func(tx *Tx) error { return tx.Put(testLease("a", "10.0.0.20/24")) })
}

func flip(path string, off int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	b := make([]byte, 1)
	_, err1 := f.ReadAt(b, off)
	b[0] ^= 1
	_, err2 := f.WriteAt(b, off)
	return errors.Join(err1, err2, f.Close())
}

// What a killed ADD or DEL leaves goes with the owner, even where the record tells nothing.
func TestDeleteOfDamagedLease(t *testing.T) {
	for name, damage := range map[string]func(s *Store) error{
		"truncated":       func(s *Store) error { return os.Truncate(boot(s, "leases/a:eth0"), 0) },
		"too long":        func(s *Store) error { return os.WriteFile(boot(s, "leases/a:eth0"), make([]byte, 3*maxRecord), 0o600) },
		"address missing": func(s *Store) error { return os.Remove(boot(s, "addresses/10.0.0.2")) },
		"address of another": func(s *Store) error {
			return errors.Join(os.Remove(boot(s, "addresses/10.0.0.2")), os.WriteFile(boot(s, "addresses/10.0.0.2"), nil, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			put(t, s, testLease("a", "10.0.0.2/24", "fd00::2/64"))
			if err := damage(s); err != nil {
				t.Fatal(err)
			}
			if e, err := find(s, "a"); err != nil || e.Whole {
				t.Fatalf("find: %v, whole %v", err, e.Whole)
			}
			if err := remove(s, "a"); err != nil {
				t.Fatal(err)
			}
			left, err := os.ReadDir(boot(s, addressDir))
			if want := map[bool]int{true: 1}[name == "address of another"]; err != nil || len(left) != want {
				t.Errorf("%d addresses left, want %d; %v", len(left), want, err)
			}
		})
	}
}

// Whoever takes the lock next completes the index, wherever a writer was killed.
func TestIndexIntentIsFinished(t *testing.T) {
	for _, linked := range []bool{true, false} {
		s := newStore(t)
		indexed(t, s, "10.0.0.2")
		put(t, s, testLease("a", "10.0.0.2/24"))
		err := s.Edit(context.Background(), func(tx *Tx) error {
			w, err := tx.window(netip.MustParseAddr("10.0.0.0"), false)
			if err != nil {
				return err
			}
			if err := tx.intend(w, 2); err != nil {
				return err
			}
			if !linked {
				return errors.Join(os.Remove(boot(s, "addresses/10.0.0.2")), os.Remove(boot(s, "leases/a:eth0")))
			}
			_, err = unix.Pwrite(w.fd, make([]byte, 8), indexData) // the bit was not set yet
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		err = s.Edit(context.Background(), func(tx *Tx) error {
			b, err := tx.Bitmap(netip.MustParseAddr("10.0.0.0"))
			if err != nil {
				return err
			}
			taken, err := b.Taken(2)
			if taken != linked {
				t.Errorf("linked %v, but the index says %v", linked, taken)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := problems(t, s, false); got != nil {
			t.Error(got)
		}
	}
}

func TestNoFileLeavesToChildren(t *testing.T) {
	s := newStore(t)
	put(t, s, testLease("a", "10.0.0.2/24"))
	err := s.Edit(context.Background(), func(*Tx) error {
		out, err := exec.Command("ls", "-l", "/proc/self/fd").CombinedOutput()
		if strings.Contains(string(out), s.dir) {
			t.Errorf("a child got our files, and with them the lock:\n%s", out)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestBadBootID(t *testing.T) {
	for _, id := range []string{"..", "x", "11111111-2222-3333-4444-55555555555g", "11111111-2222-3333-4444-5555555555555"} {
		if _, err := New(t.TempDir(), Options{BootID: id}); err == nil {
			t.Errorf("boot ID %q was taken", id)
		}
	}
}
