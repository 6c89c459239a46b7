// Package inetsum is the checksum of IP, TCP, UDP and ICMP (RFC 1071).
package inetsum

import "encoding/binary"

// Of is what goes into the field for the checksum of b, in which that field is zero.
func Of(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
