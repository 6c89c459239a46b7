// Package nearest finds the key that somebody meant who mistyped one.
package nearest

import (
	"slices"
	"strings"
)

// shortened is the length in bytes from which on a key may stand for a longer one that begins with it.
const shortened = 4

// Key returns the known key that is most like a mistyped one, or "" where none is like it. Case, underscores and dashes do not
// count; of the rest a third may differ, or the end may be missing.
func Key(mistyped string, known []string) string {
	best, least := "", 0
	from := plain(mistyped)
	for _, key := range slices.Sorted(slices.Values(known)) {
		to := plain(key)
		d := distance(from, to)
		if len(from) >= shortened && strings.HasPrefix(to, from) {
			d = min(d, 1)
		}
		if d <= max(1, len(from)/3) && (best == "" || d < least) {
			best, least = key, d
		}
	}
	return best
}

func plain(key string) string {
	return strings.ToLower(strings.NewReplacer("_", "", "-", "").Replace(key))
}

// distance is how many bytes have to be put in, left out, changed, or swapped with their neighbour to make b of a (the optimal
// string alignment distance).
func distance(a, b string) int {
	var before, above []int // two rows and one row up
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		before, above, row = above, row, make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			change := above[j-1]
			if a[i-1] != b[j-1] {
				change++
			}
			row[j] = min(above[j]+1, row[j-1]+1, change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
	}
	return row[len(b)]
}
