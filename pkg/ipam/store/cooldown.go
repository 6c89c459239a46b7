package store

import (
	"encoding/binary"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// An index knows the addresses of its window that were freed last, and when. Nothing relies on it: an address in cooldown is free, and
// where the index is lost, so are the cooldowns.
const (
	// cooldownSlots is about as many as a node has pods: so many can end at once.
	cooldownSlots = 128
	// cooldownSlot is the size of one: the address's offset in 4 bytes, and in 4 when it was freed, in seconds since the boot + 1, 0 = never.
	cooldownSlot = 8
)

// freed is one slot.
type freed struct{ offset, at uint32 }

// sinceBoot is the age of the boot. Unlike the clock nobody sets it, and it is the same in all processes.
func sinceBoot() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0 // no kernel that we can run on
	}
	return time.Duration(t.Nano())
}

func (s *Store) seconds() uint32 { return uint32(s.age()/time.Second) + 1 }

func (w *window) readCooldown(b []byte) {
	for i := range w.freed {
		slot := b[i*cooldownSlot:]
		w.freed[i] = freed{binary.LittleEndian.Uint32(slot), binary.LittleEndian.Uint32(slot[4:])}
	}
}

// CoolingDown returns the addresses of a window that was looked at which were freed within the last d, to the second.
func (tx *Tx) CoolingDown(base netip.Addr, d time.Duration) (list []netip.Addr) {
	w, now := tx.windows[base], tx.s.seconds()
	if w == nil {
		return nil
	}
	for _, f := range w.freed {
		if f.at != 0 && f.offset < WindowSize && f.at <= now && now-f.at <= uint32(d/time.Second) {
			list = append(list, At(base, f.offset))
		}
	}
	return list
}

// coolDown records that an address is being freed, in the slot of the one that was freed longest ago. Where that cannot be written the
// address may be given again at once, which is no reason to keep it.
func (tx *Tx) coolDown(a netip.Addr) {
	base, offset := Locate(a)
	w, err := tx.window(base, false)
	if err != nil || w == nil {
		return // no index: see free
	}
	oldest := 0
	for i, f := range w.freed {
		if f.offset == offset && f.at != 0 {
			oldest = i
			break
		}
		if f.at < w.freed[oldest].at {
			oldest = i
		}
	}
	f := freed{offset, tx.s.seconds()}
	b := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, f.offset), f.at)
	if writeAll(tx.s.fs, w.fd, b, int64(indexCooldown+oldest*cooldownSlot)) == nil {
		w.freed[oldest] = f
	}
}
