package e2e

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──[ul]── b        a: the keeper; b: a machine as of a Kubernetes cluster: containerd, without a kubelet
//
// containerd is asked for what the DaemonSet says, as a kubelet asks: the init container,
// the node's, and a pod that the node attaches.

// podSpec is what the test reads of the DaemonSet.
type podSpec struct {
	InitContainers []podContainer `yaml:"initContainers"`
	Containers     []podContainer `yaml:"containers"`
	Volumes        []struct {
		Name     string
		HostPath struct{ Path string } `yaml:"hostPath"`
	}
}

type podContainer struct {
	Name, Image  string
	Args         []string
	VolumeMounts []struct {
		Name             string
		MountPath        string `yaml:"mountPath"`
		MountPropagation string `yaml:"mountPropagation"`
	} `yaml:"volumeMounts"`
	ReadinessProbe struct {
		Exec struct{ Command []string }
	} `yaml:"readinessProbe"`
}

// daemonSet reads the DaemonSet's pod, and checks what no schema does.
func daemonSet(t *testing.T, text []byte) podSpec {
	t.Helper()
	var d struct {
		Kind string
		Spec struct {
			Selector struct {
				MatchLabels map[string]string `yaml:"matchLabels"`
			}
			Template struct {
				Metadata struct{ Labels map[string]string }
				Spec     podSpec
			}
		}
	}
	parts := strings.Split(string(text), "\n---\n")
	if err := yaml.Unmarshal([]byte(parts[len(parts)-1]), &d); err != nil || d.Kind != "DaemonSet" {
		t.Fatalf("the last object is %q (%v), want the DaemonSet", d.Kind, err)
	}
	for k, v := range d.Spec.Selector.MatchLabels {
		if d.Spec.Template.Metadata.Labels[k] != v {
			t.Errorf("the selector does not match the pods: %s", k)
		}
	}
	pod := d.Spec.Template.Spec
	used := map[string]bool{}
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		for _, m := range c.VolumeMounts {
			used[m.Name] = true
		}
	}
	for _, v := range pod.Volumes {
		if !used[v.Name] {
			t.Errorf("volume %s is mounted nowhere", v.Name)
		}
		delete(used, v.Name)
	}
	if len(used) > 0 || len(pod.InitContainers) != 1 || len(pod.Containers) != 1 {
		t.Fatalf("there are no volumes %v, or there are other containers than one of each: %+v", used, pod)
	}
	return pod
}

func TestExampleKubernetes(t *testing.T) {
	t.Parallel()
	const folder = "../examples/kubernetes/"
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: exampleNet})
	text, err := os.ReadFile(folder + "tulle.yaml")
	if err != nil {
		t.Fatal(err)
	}
	pod := daemonSet(t, text)

	t.Run("the schema", func(t *testing.T) {
		tool := filepath.Join(l.Dir(), "check")
		if out, err := exec.Command("go", "build", "-C", "testdata/kubernetes", "-buildvcs=false", "-o", tool, ".").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		check := func(text []byte) (string, error) {
			file := filepath.Join(t.TempDir(), "tulle.yaml")
			if err := os.WriteFile(file, text, 0o644); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(tool, file)
			cmd.Dir = "testdata/kubernetes"
			out, err := cmd.CombinedOutput()
			return string(out), err
		}
		if out, err := check(text); err != nil || out != "v1 Namespace tulle\nv1 ServiceAccount tulle\napps/v1 DaemonSet tulle\n" {
			t.Errorf("%v: %s", err, out)
		}
		// The check would find what is wrong.
		for was, is := range map[string]string{"hostPID: true": "hostPid: true", "privileged: true": "privileged: sure", "maxUnavailable: 1": "maxUnavailable: [1]", "apps/v1": "apps/v0",
			"  selector:\n    matchLabels:\n      app.kubernetes.io/name: tulle\n": ""} {
			bad := bytes.Replace(text, []byte(was), []byte(is), 1)
			if out, err := check(bad); err == nil || bytes.Equal(bad, text) {
				t.Errorf("%q in place of %q passes: %s", is, was, out)
			}
		}
	})

	machines := kubernetesMachines{t, l, h, pod}
	machines.run()
}

// kubernetesMachines are a keeper and a machine whose container runtime is asked for
// what the manifest says, as a kubelet asks.
type kubernetesMachines struct {
	t   *testing.T
	l   *lab.Lab
	h   []*lab.Host
	pod podSpec
}

func (m kubernetesMachines) run() {
	t, l := m.t, m.l
	a := joined(t, l, m.h[:1], nil)[0]
	a.do("overlay", "create", "pods", "--subnet", "10.64.0.0/16", "--gateway", "true")
	token := a.token("--overlays", "pods")
	peer := space(t, "peer")
	at := a.attaches("pods", "--netns", peer)

	dir := l.Dir()
	for _, d := range []string{"net.d", "plugins", "var", "run", "logs"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(debianPlugins+"/loopback", dir+"/plugins/loopback"); err != nil {
		t.Fatal(err)
	}
	tool, client := module(t, dir, "./crinode"), module(t, dir, "./cripod")
	images := map[string]string{"tulle:latest": dir + "/tulle.tar", "lab.test/bb:1": dir + "/bb.tar"}
	writeImageOf(t, images["tulle:latest"], "docker.io/library/tulle:latest", "tulle", binary, nil, object{"Entrypoint": []string{"/tulle"}})
	writeImage(t, images["lab.test/bb:1"], "lab.test/bb:1")
	c := startContainerd(t, m.h[1], dir)
	for _, file := range images {
		c.ctr("-n", "k8s.io", "images", "import", file)
	}
	// Two machines of one cannot share default paths: what the manifest has at these is elsewhere.
	elsewhere := map[string]string{"/var/lib/tulle": dir + "/var", "/run/tulle": dir + "/run"}
	sock := dir + "/run/tulle.sock"
	start := func(p podContainer, env ...string) *lab.Process {
		t.Helper()
		args := []string{"-name", p.Name, "-logs", dir + "/logs"}
		for _, e := range env {
			args = append(args, "-env", e)
		}
		for _, mount := range p.VolumeMounts {
			for _, v := range m.pod.Volumes {
				if v.Name != mount.Name {
					continue
				}
				from, to := v.HostPath.Path, mount.MountPath
				if other := elsewhere[from]; other != "" {
					from = other
				}
				if to == "/run/tulle" {
					to = dir + "/run"
				}
				arg := from + "=" + to
				if mount.MountPropagation == "HostToContainer" {
					arg += "=slave"
				}
				args = append(args, "-mount", arg)
			}
		}
		args = append(args, c.socket, "docker.io/library/"+p.Image)
		for _, arg := range p.Args {
			args = append(args, strings.ReplaceAll(arg, "$(TULLE_TOKEN)", token))
		}
		process, err := m.h[1].Start(exec.Command(tool, args...))
		if err != nil {
			t.Fatal(err)
		}
		return process
	}
	logOf := func(p podContainer) string {
		b, _ := os.ReadFile(dir + "/logs/" + p.Name + ".log")
		return string(b)
	}

	install := m.pod.InitContainers[0]
	if p := start(install, "TULLE_SOCKET="+sock); p.Wait() != nil {
		t.Fatalf("the init container fails: %s%s", p.Log(), logOf(install))
	}
	got, err := os.ReadFile(dir + "/net.d/10-tulle.conflist")
	want, err2 := os.ReadFile("../examples/kubernetes/10-tulle.conflist")
	if err != nil || err2 != nil || strings.Replace(string(got), sock, "/run/tulle/tulle.sock", 1) != string(want) {
		t.Errorf("%v, %v: the init container writes\n%s, and the example has\n%s", err, err2, got, want)
	}

	main := m.pod.Containers[0]
	running := start(main, "TULLE_SOCKET="+sock, "TULLE_TOKEN="+token)
	b := &tulle{t: t, host: m.h[1], name: "b", sock: sock, http: http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", sock)
		},
	}}}
	probe := main.ReadinessProbe.Exec.Command
	if probe[0] != "/tulle" {
		t.Errorf("the probe is %v", probe)
	}
	defer func() {
		if err := running.Stop(15 * time.Second); err != nil {
			t.Errorf("the node's pod: %v: %s", err, running.Log())
		}
		if t.Failed() {
			t.Log(logOf(main))
		}
	}()
	b.eventually(20*time.Second, "the readiness probe succeeds", func() bool {
		select {
		case <-running.Done():
			t.Fatalf("the node's pod ended: %s%s", running.Log(), logOf(main))
		default:
		}
		status, _, _ := b.command(probe[1:]...)
		return status == 0
	})
	known(t, 10*time.Second, "pods", true, b)
	own := b.exposed("pods")

	// A pod, through the plugin that was copied, whose namespace the node finds in its own container.
	out, err := c.inside(client, c.socket, "lab.test/bb:1", "sh", "-c", "ip route && ping -c 1 -W 5 "+own.Addr().String()+" && ping -c 1 -W 10 "+at.Addr().String())
	if err != nil || strings.Count(out, "1 packets received") != 2 || !strings.Contains(out, "default via 10.64.0.1 dev eth0") {
		t.Errorf("a pod: %v: %s", err, out)
	}
	b.eventually(5*time.Second, "its endpoint is gone", func() bool { return len(get[node.Endpoints](b, "/v1/endpoints?local=true").Endpoints) == 1 })
}
