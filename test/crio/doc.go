// Package crio runs a node on which CRI-O makes the pods' networks: its own module for them, without the rest of CRI-O.
package crio
