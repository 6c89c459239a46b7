//go:build !race

package tailnet

const raceDetector = false
