package tap

import (
	"encoding/binary"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A TAP of several queues sends each flow, by itself, to the queue that the
// flow's answers were last written to. So a flow changes its queue when its
// first answer comes, while frames wait in the old one, and they are overtaken.
// The program below decides by the frame alone instead (TUNSETSTEERINGEBPF): for
// TCP by addresses and ports, otherwise by addresses, because a fragment has no
// ports. What is neither IPv4 nor IPv6 goes to the first queue. VLAN tags are not
// in the way: the kernel holds the outer one beside the frame.

// Instructions of eBPF (RFC 9669); loads by absolute offset leave their result
// in r0, end the program with 0 when the frame is too short, and want the
// context in r6.
const (
	bpfMov64   = 0xbf // dst = src
	bpfMov32   = 0xbc
	bpfMovImm  = 0xb7 // dst = imm
	bpfXor     = 0xaf // dst ^= src
	bpfMulImm  = 0x24 // 32 bits: dst *= imm
	bpfRshImm  = 0x74 // 32 bits: dst >>= imm
	bpfLoad8   = 0x30 // r0 = frame[imm]
	bpfLoad16  = 0x28
	bpfLoad32  = 0x20
	bpfJumpEq  = 0x15 // if dst == imm, skip off instructions
	bpfJumpNot = 0x55
	bpfJump    = 0x05
	bpfExit    = 0x95
)

// instruction is one of eBPF's, 8 bytes.
type instruction struct {
	code     byte
	dst, src byte
	off      int16
	imm      uint32
}

// steering returns a hash; the kernel takes it modulo the number of queues.
var steering = []instruction{
	{bpfMov64, 6, 1, 0, 0},
	{bpfLoad16, 0, 0, 0, 12}, // EtherType
	{bpfJumpEq, 0, 0, 3, 0x0800},
	{bpfJumpEq, 0, 0, 12, 0x86dd},
	{bpfMovImm, 0, 0, 0, 0},
	{bpfExit, 0, 0, 0, 0},
	// IPv4: r7 = source ^ destination; the ports of TCP, if there are no options.
	{bpfLoad32, 0, 0, 0, 26},
	{bpfMov64, 7, 0, 0, 0},
	{bpfLoad32, 0, 0, 0, 30},
	{bpfXor, 7, 0, 0, 0},
	{bpfLoad8, 0, 0, 0, 14},
	{bpfJumpNot, 0, 0, 12, 0x45},
	{bpfLoad8, 0, 0, 0, 23},
	{bpfJumpNot, 0, 0, 10, 6},
	{bpfLoad32, 0, 0, 0, 34},
	{bpfJump, 0, 0, 7, 0},
	// IPv6: the last words of the addresses; the ports of TCP, if it comes first.
	{bpfLoad32, 0, 0, 0, 34},
	{bpfMov64, 7, 0, 0, 0},
	{bpfLoad32, 0, 0, 0, 50},
	{bpfXor, 7, 0, 0, 0},
	{bpfLoad8, 0, 0, 0, 20},
	{bpfJumpNot, 0, 0, 2, 6},
	{bpfLoad32, 0, 0, 0, 54},
	{bpfXor, 7, 0, 0, 0},
	// Spread r7.
	{bpfMulImm, 7, 0, 0, 0x9e3779b1},
	{bpfRshImm, 7, 0, 0, 16},
	{bpfMov32, 0, 7, 0, 0},
	{bpfExit, 0, 0, 0, 0},
}

// steer has the program choose the queue of each frame of the device that fd is
// a queue of. It needs CAP_BPF, or kernel.unprivileged_bpf_disabled=0.
func steer(fd int) error {
	program := make([]byte, 0, 8*len(steering))
	for _, i := range steering {
		program = append(program, i.code, i.src<<4|i.dst)
		if !littleEndian {
			program[len(program)-1] = i.dst<<4 | i.src
		}
		program = binary.NativeEndian.AppendUint16(program, uint16(i.off))
		program = binary.NativeEndian.AppendUint32(program, i.imm)
	}
	license := []byte("GPL\x00")
	// union bpf_attr of BPF_PROG_LOAD, bpf(2): type, instructions, license.
	var attr [48]byte
	binary.NativeEndian.PutUint32(attr[0:], unix.BPF_PROG_TYPE_SOCKET_FILTER)
	binary.NativeEndian.PutUint32(attr[4:], uint32(len(steering)))
	binary.NativeEndian.PutUint64(attr[8:], uint64(uintptr(unsafe.Pointer(&program[0]))))
	binary.NativeEndian.PutUint64(attr[16:], uint64(uintptr(unsafe.Pointer(&license[0]))))
	r, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(program)
	runtime.KeepAlive(license)
	if errno != 0 {
		return os.NewSyscallError("bpf", errno)
	}
	prog := int32(r)
	defer unix.Close(int(prog))
	_, _, errno = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETSTEERINGEBPF, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return os.NewSyscallError("TUNSETSTEERINGEBPF", errno)
	}
	return nil
}

// littleEndian is the order of this machine, and of the register fields in an instruction.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1
