package chart

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/nstest"
)

// calm are series of two nodes and a controller with which all is well, as promtool writes them: a value and what is added each minute.
var calm = map[string]string{
	`headcni_part_ok{node="a",instance="a:9669",part="routes"}`:                                    "1",
	`headcni_part_ok{node="b",instance="b:9669",part="routes"}`:                                    "1",
	`headcni_guard_dropped_packets_total{node="a",instance="a:9669",reason="cluster_in_clear"}`:    "0",
	`headcni_guard_dropped_packets_total{node="a",instance="a:9669",reason="pod_forged"}`:          "0",
	`headcni_guard_self_test_ok{node="a",instance="a:9669"}`:                                       "1",
	`headcni_policy_unknown_seconds{node="a",instance="a:9669"}`:                                   "0",
	`headcni_network_errors_total{node="a",instance="a:9669",stage="ipam"}`:                        "3",
	`headcni_pod_network_setup_duration_seconds_bucket{node="a",instance="a:9669",le="0.1"}`:       "0+10",
	`headcni_pod_network_setup_duration_seconds_bucket{node="a",instance="a:9669",le="5"}`:         "0+10",
	`headcni_pod_network_setup_duration_seconds_bucket{node="a",instance="a:9669",le="+Inf"}`:      "0+10",
	`headcni_ip_pool_addresses_in_use{node="a",instance="a:9669",network="headcni",family="ipv4"}`: "110",
	`headcni_ip_pool_addresses{node="a",instance="a:9669",network="headcni",family="ipv4"}`:        "253",
	`headcni_node_key_expiry_timestamp_seconds{node="a",instance="a:9669"}`:                        "0",
	`headcni_pod_peers{node="a",instance="a:9669",path="direct"}`:                                  "1",
	`headcni_pod_peers{node="a",instance="a:9669",path="relayed"}`:                                 "0",
	`headcni_pod_peers{node="a",instance="a:9669",path="offline"}`:                                 "0",
	`headcni_smallest_path_bytes{node="a",instance="a:9669"}`:                                      "1280",
	`headcni_conntrack_entries{node="a",instance="a:9669"}`:                                        "100",
	`headcni_conntrack_max_entries{node="a",instance="a:9669"}`:                                    "1000",
	`headcni_conntrack_full_total{node="a",instance="a:9669"}`:                                     "3",
	`headcni_controller_leader{instance="c:9670"}`:                                                 "1",
	`headcni_controller_leader{instance="d:9670"}`:                                                 "0",
	`headcni_controller_passes_total{instance="c:9670",result="right"}`:                            "0+1",
	`headcni_controller_passes_total{instance="d:9670",result="right"}`:                            "0",
	`headcni_controller_headscale_up{instance="c:9670"}`:                                           "1",
	`headcni_controller_headscale_up{instance="d:9670"}`:                                           "0",
	`headcni_controller_nodes{instance="c:9670",state="routed"}`:                                   "2",
	`headcni_controller_nodes{instance="c:9670",state="pending"}`:                                  "0",
	`headcni_controller_nodes{instance="c:9670",state="refused"}`:                                  "0",
	`headcni_controller_nodes{instance="c:9670",state="unjoined"}`:                                 "1",
	`headcni_policy_findings{instance="c:9670",check="claims"}`:                                    "0",
	`headcni_policy_findings{instance="c:9670",check="acls"}`:                                      "0",
	`headcni_join_key_expiry_timestamp_seconds{instance="c:9670"}`:                                 "21600+60",
	`headcni_headscale_api_key_expiry_timestamp_seconds{instance="c:9670"}`:                        "0",
}

// alarms are what is different when an alert is due. "" takes a series away.
var alarms = map[string]map[string]string{
	"HeadCNINodeNotRight":        {`headcni_part_ok{node="a",instance="a:9669",part="routes"}`: "0"},
	"HeadCNIDaemonsMissing":      {`headcni_part_ok{node="b",instance="b:9669",part="routes"}`: ""},
	"HeadCNIGuardHolds":          {`headcni_guard_dropped_packets_total{node="a",instance="a:9669",reason="cluster_in_clear"}`: "0+1"},
	"HeadCNIGuardDoesNotWork":    {`headcni_guard_self_test_ok{node="a",instance="a:9669"}`: "0"},
	"HeadCNIPodForges":           {`headcni_guard_dropped_packets_total{node="a",instance="a:9669",reason="pod_forged"}`: "0+20"},
	"HeadCNIPodsWaitForPolicies": {`headcni_policy_unknown_seconds{node="a",instance="a:9669"}`: "90"},
	"HeadCNIPodsFailToStart":     {`headcni_network_errors_total{node="a",instance="a:9669",stage="ipam"}`: "0+1"},
	"HeadCNIPodNetworkSlow":      {`headcni_pod_network_setup_duration_seconds_bucket{node="a",instance="a:9669",le="0.1"}`: "0+9"},
	"HeadCNIPodAddressesRunOut":  {`headcni_ip_pool_addresses_in_use{node="a",instance="a:9669",network="headcni",family="ipv4"}`: "240"},
	"HeadCNIConnectionsFull":     {`headcni_conntrack_entries{node="a",instance="a:9669"}`: "950"},
	"HeadCNINoLeader":            {`headcni_controller_leader{instance="c:9670"}`: "0"},
	"HeadCNIControllerStuck":     {`headcni_controller_passes_total{instance="c:9670",result="right"}`: "7"},
	"HeadCNIHeadscaleDown":       {`headcni_controller_headscale_up{instance="c:9670"}`: "0"},
	"HeadCNINodesNotRouted":      {`headcni_controller_nodes{instance="c:9670",state="pending"}`: "1", `headcni_controller_nodes{instance="c:9670",state="routed"}`: "1"},
	"HeadCNIClaimRefused":        {`headcni_policy_findings{instance="c:9670",check="claims"}`: "1"},
	"HeadCNIPolicyFinding":       {`headcni_policy_findings{instance="c:9670",check="acls"}`: "1"},
	"HeadCNIJoinKeyExpires":      {`headcni_join_key_expiry_timestamp_seconds{instance="c:9670"}`: "8600"},
	"HeadCNIAPIKeyExpires":       {`headcni_headscale_api_key_expiry_timestamp_seconds{instance="c:9670"}`: "518400"},
	"HeadCNINodeKeyExpires":      {`headcni_node_key_expiry_timestamp_seconds{node="a",instance="a:9669"}`: "518400"},
	"HeadCNIPeersOffline":        {`headcni_pod_peers{node="a",instance="a:9669",path="offline"}`: "1"},
	"HeadCNIPeersRelayed":        {`headcni_pod_peers{node="a",instance="a:9669",path="relayed"}`: "1"},
	"HeadCNISmallPath":           {`headcni_smallest_path_bytes{node="a",instance="a:9669"}`: "1230"},
}

// lookAt is when alerts are looked at, after the longest "for"; series go on a while longer.
const lookAt, minutes = "140m", 150

// Each alert comes when it should, alone, and none while all is well. docs/alerts.md says what to do about each.
func TestAlerts(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		nstest.Skip(t, "no promtool: run make test, or apt-get install prometheus")
	}
	rules, err := filepath.Abs(filepath.Join(chartDir, "files/rules.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(rules)
	if err != nil {
		t.Fatal(err)
	}
	runbook, err := os.ReadFile(filepath.Join(root, "docs/alerts.md"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(string(b), -1) {
		names = append(names, m[1])
		if !strings.Contains(string(runbook), "\n## "+m[1]+"\n") {
			t.Errorf("docs/alerts.md lacks %s", m[1])
		}
	}
	if have := slices.Sorted(maps.Keys(alarms)); !slices.Equal(have, slices.Sorted(slices.Values(names))) {
		t.Fatalf("alarms are of %v, and the alerts are %v", have, names)
	}
	var tests []map[string]any
	for _, alert := range append([]string{""}, names...) {
		with := maps.Clone(calm)
		for series, values := range alarms[alert] {
			if _, ok := with[series]; !ok {
				t.Fatalf("%s changes %s, which there is not", alert, series)
			}
			with[series] = values
		}
		var input []map[string]any
		for series, values := range with {
			if values != "" {
				input = append(input, map[string]any{"series": series, "values": fmt.Sprintf("%s+0x%d", values, minutes)})
			}
			if strings.Contains(values, "+") {
				input[len(input)-1]["values"] = fmt.Sprintf("%sx%d", values, minutes)
			}
		}
		want := []map[string]any{}
		if alert != "" {
			want = append(want, map[string]any{"labels": fmt.Sprintf("{alertname=%q}", alert), "value": 1})
		}
		tests = append(tests, map[string]any{
			"name": alert, "interval": "1m", "input_series": input,
			"promql_expr_test": []map[string]any{{
				"expr": `count by (alertname) (count by (alertname) (ALERTS{alertstate="firing"}))`, "eval_time": lookAt, "exp_samples": want,
			}},
		})
	}
	text, err := yaml.Marshal(map[string]any{"rule_files": []string{rules}, "evaluation_interval": "1m", "tests": tests})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "alerts.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), promtool, "test", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("promtool test rules: %v\n%s", err, out)
	}
}
