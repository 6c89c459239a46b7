// Command empty does nothing: what a Go process costs at the least.
package main

func main() {}
