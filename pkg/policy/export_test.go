package policy

// SetOverlaps has port ranges made into one map up to so many overlaps.
func (k *Compiler) SetOverlaps(n int) { k.overlaps = n }
