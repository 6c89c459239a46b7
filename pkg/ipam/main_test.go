package ipam

import (
	"os"
	"testing"
)

// TestMain lets this binary be a worker process too: tests of many processes start it again with workerEnv.
func TestMain(m *testing.M) {
	if job := os.Getenv(workerEnv); job != "" {
		os.Exit(work(job))
	}
	os.Exit(m.Run())
}

// testDir is a folder for leases that goes with the test. It is in memory where that is possible: on ext4 making files
// costs more the more were removed in the last minutes, which says nothing about us. HEADCNI_TEST_DIR names another place.
func testDir(t testing.TB) string {
	t.Helper()
	parent := "/dev/shm"
	if dir := os.Getenv("HEADCNI_TEST_DIR"); dir != "" {
		parent = dir
	}
	dir, err := os.MkdirTemp(parent, "headcni-ipam-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
