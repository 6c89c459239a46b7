// Package chart is the Helm chart, as headcnictl installs it.
package chart

import "embed"

// Files are the chart's: what Helm needs of this folder.
//
//go:embed Chart.yaml README.md values.yaml values.schema.json files all:templates
var Files embed.FS
