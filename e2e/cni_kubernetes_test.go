package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──[ul]── b        a: the keeper; b: a machine of the Kubernetes cluster, on which the manifest's commands run

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
	Name         string
	Args         []string
	VolumeMounts []struct {
		Name      string
		MountPath string `yaml:"mountPath"`
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

	a := joined(t, l, h[:1], nil)[0]
	a.do("overlay", "create", "pods", "--subnet", "10.64.0.0/16", "--gateway", "true")
	token := a.token("--overlays", "pods")
	dirs := strings.NewReplacer("/host/", l.Dir()+"/host/")
	for _, d := range []string{"/host/opt/cni/bin", "/host/etc/cni/net.d"} {
		if err := os.MkdirAll(l.Dir()+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var args []string
	for _, arg := range pod.InitContainers[0].Args {
		args = append(args, dirs.Replace(arg))
	}
	if status, out, errs := runTulle(t, h[1], args...); status != 0 {
		t.Fatalf("the init container: status %d: %s%s", status, out, errs)
	}
	got, err := os.ReadFile(l.Dir() + "/host/etc/cni/net.d/10-tulle.conflist")
	want, err2 := os.ReadFile(folder + "10-tulle.conflist")
	if err != nil || err2 != nil || !bytes.Equal(got, want) {
		t.Errorf("%v, %v: the init container writes\n%s, and the example has\n%s", err, err2, got, want)
	}

	args = nil
	for _, arg := range pod.Containers[0].Args {
		args = append(args, strings.ReplaceAll(arg, "$(TULLE_TOKEN)", token))
	}
	if args[0] != "up" {
		t.Fatalf("the container runs %v", args)
	}
	// Two machines in one cannot share default paths and a name: up has its own.
	b := up(t, l, h[1], args[1:]...)
	probe := pod.Containers[0].ReadinessProbe.Exec.Command
	if probe[0] != "/tulle" {
		t.Errorf("the probe is %v", probe)
	}
	b.do(probe[1:]...)
	known(t, 10*time.Second, "pods", true, b)
	// What the configuration that was written asks for. A kubelet's probe is from the
	// machine, which is no endpoint.
	netns := space(t, "pod")
	c := cniNetwork(t, b, "tulle", "pods", "1.0.0")
	r := c.add(attachment{"pod", netns, "eth0", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0"})
	ping(t, h[1], r.IPs[0].Address.Addr(), 5*time.Second)
	if list := b.attached(isNamed("web-0")); len(list) != 1 || list[0].Gateways == nil {
		t.Errorf("the pod's endpoint: %+v", list)
	}
	// And with the machine on the overlay too, one of its pods from another's machine.
	b.exposed("pods")
	a.exposed("pods")
	ping(t, h[1], r.IPs[0].Address.Addr(), 5*time.Second)
	ping(t, h[0], r.IPs[0].Address.Addr(), 10*time.Second)
	c.done("DEL", attachment{"pod", netns, "eth0", ""})
}
