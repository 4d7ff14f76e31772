// Command cripod asks a container runtime, as a kubelet does, for a pod that runs one command.
//
//	cripod SOCKET IMAGE COMMAND ARG…     prints the pod's address, then what the command prints
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func main() {
	if err := run(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(socket, image string, command []string) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	c := cri.NewRuntimeServiceClient(conn)
	config := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: "web-0", Namespace: "default", Uid: "1"}, Linux: &cri.LinuxPodSandboxConfig{},
		Annotations: map[string]string{"kubernetes.io/egress-bandwidth": "100M", "kubernetes.io/ingress-bandwidth": "100M"},
		// As of a container with hostPort 8090, and one that names its port only.
		PortMappings: []*cri.PortMapping{{Protocol: cri.Protocol_TCP, ContainerPort: 80, HostPort: 8090}, {Protocol: cri.Protocol_SCTP, ContainerPort: 81}},
	}
	pod, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		return fmt.Errorf("run the pod: %w", err)
	}
	defer func() {
		_, stop := c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod.PodSandboxId})
		_, remove := c.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod.PodSandboxId})
		err = errors.Join(err, stop, remove)
	}()
	status, err := c.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: pod.PodSandboxId})
	if err != nil {
		return fmt.Errorf("the pod's status: %w", err)
	}
	fmt.Println(status.Status.Network.Ip)
	made, err := c.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod.PodSandboxId, SandboxConfig: config, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: image}, Command: []string{"/bin/sleep", "60"}, Linux: &cri.LinuxContainerConfig{},
	}})
	if err != nil {
		return fmt.Errorf("create the container: %w", err)
	}
	if _, err := c.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: made.ContainerId}); err != nil {
		return fmt.Errorf("start the container: %w", err)
	}
	done, err := c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: made.ContainerId, Cmd: command, Timeout: 10})
	if err != nil {
		return fmt.Errorf("run %v: %w", command, err)
	}
	fmt.Printf("%s%s", done.Stdout, done.Stderr)
	if done.ExitCode != 0 {
		return fmt.Errorf("%v: status %d", command, done.ExitCode)
	}
	return nil
}
