// Package store keeps the address leases of one CNI network on disk, safe for many processes at once.
//
// # Layout
//
//	<dir>/                                  one folder per network, mode 0700
//	  lock                                  flock(2) around every change
//	  <boot ID>/                            this boot; those of other boots are removed
//	    layout                              "headcni-ipam 1"
//	    leases/<container ID>:<interface>   the record of one attachment, text
//	    addresses/<address>                 hard link to the record of whoever holds the address
//	    last.<n>                            the address that range set n gave last
//	    index/<base>-<bits>                 bitmap of taken addresses; derived, may be deleted
//	  <boot ID>.corrupt-<time>/             a store that was set aside, until the next boot
//
// Everything but the index is text: `ls addresses` shows what is taken, `cat addresses/10.244.0.7` by whom.
//
// # Guarantees
//
// The links in addresses are the truth. link(2) fails where the name exists, so no address is ever given twice, whatever
// the index says. A process may be killed between any two system calls, and the disk may be full at any of them:
//   - A record names its addresses before the first of them is linked, and is removed after the last of them is
//     unlinked. So what a killed process leaves behind is named by the record of its owner, and goes with the owner's
//     release, its next allocation, or garbage collection. Whether a record is whole is seen from the inodes.
//   - The index says before each change which address it is about to change. The next process to take the lock
//     completes an unfinished change by asking whether the link exists. Each part of the index is checked against its
//     own summary when it is read; an index that is wrong, missing or unwritable is made anew from the links.
//   - A step that fails undoes the steps before it.
//   - Whoever only looks makes nothing and changes nothing, and needs no writable disk.
//
// No sandbox survives a reboot, so leases belong to a boot (random(4), boot_id), a new boot starts empty, and nothing is
// ever synced to disk: power loss ends the boot. The clock is not relied upon. An index also holds which addresses were
// freed last: those are in cooldown, and not given while others are free.
//
// Allocation and release cost a fixed number of system calls, whatever the number of leases and the size of the range.
// Only these walk all leases: listing, checking, and making an index anew.
package store
