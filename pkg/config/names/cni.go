package names

// ValidAttachments is the key of the list that GC gets (CNI specification, section 2), and AttachmentsAsReleased what the specification called
// it when 1.1.0 was released: runtimes send the one, the other or both, and what is in one of them is valid. Unlike any other key they mean the
// same where they are null as where they are empty: a Go runtime that knows of no attachment may have a nil list.
const (
	ValidAttachments      = "cni.dev/valid-attachments"
	AttachmentsAsReleased = "cni.dev/attachments"
)
