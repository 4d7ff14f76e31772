// Command crinode asks a container runtime, as a kubelet does, for a pod on the machine's own network, and runs one privileged container in it.
//
//	crinode -name N -logs DIR [-env K=V]… [-mount HOST=CONTAINER[=slave]]… SOCKET IMAGE ARG…
//
// It ends with the container, or ends it when it is asked to end by SIGTERM.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type list []string

func (l *list) String() string     { return fmt.Sprint(*l) }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func main() {
	name, logs := flag.String("name", "", ""), flag.String("logs", "", "")
	var env, mounts list
	flag.Var(&env, "env", "")
	flag.Var(&mounts, "mount", "")
	flag.Parse()
	c := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: *name}, Image: &cri.ImageSpec{Image: flag.Arg(1)}, Args: flag.Args()[2:], LogPath: *name + ".log",
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{Privileged: true, NamespaceOptions: ofTheMachine}},
	}
	for _, e := range env {
		k, v, _ := strings.Cut(e, "=")
		c.Envs = append(c.Envs, &cri.KeyValue{Key: k, Value: v})
	}
	for _, m := range mounts {
		part := strings.Split(m, "=")
		mount := &cri.Mount{HostPath: part[0], ContainerPath: part[1]}
		if len(part) == 3 {
			mount.Propagation = cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		}
		c.Mounts = append(c.Mounts, mount)
	}
	if err := run(flag.Arg(0), *logs, c); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// ofTheMachine: no network and process namespace of its own.
var ofTheMachine = &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_NODE}

func run(socket, logs string, config *cri.ContainerConfig) (err error) {
	asked, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	c := cri.NewRuntimeServiceClient(conn)
	sandbox := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: config.Metadata.Name, Namespace: "tulle", Uid: config.Metadata.Name}, LogDirectory: logs,
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{Privileged: true, NamespaceOptions: ofTheMachine}},
	}
	pod, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: sandbox})
	if err != nil {
		return fmt.Errorf("run the pod: %w", err)
	}
	defer func() {
		_, stop := c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod.PodSandboxId})
		_, remove := c.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod.PodSandboxId})
		err = errors.Join(err, stop, remove)
	}()
	made, err := c.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod.PodSandboxId, SandboxConfig: sandbox, Config: config})
	if err != nil {
		return fmt.Errorf("create the container: %w", err)
	}
	if _, err := c.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: made.ContainerId}); err != nil {
		return fmt.Errorf("start the container: %w", err)
	}
	for {
		s, err := c.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: made.ContainerId})
		switch {
		case err != nil:
			return fmt.Errorf("the container's status: %w", err)
		case s.Status.State == cri.ContainerState_CONTAINER_EXITED && s.Status.ExitCode != 0:
			return fmt.Errorf("the container ended with %d", s.Status.ExitCode)
		case s.Status.State == cri.ContainerState_CONTAINER_EXITED:
			return nil
		}
		select {
		case <-asked.Done():
			_, err := c.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: made.ContainerId, Timeout: 10})
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}
