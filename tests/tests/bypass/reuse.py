"""Gives a connection to a process, and its process id to another one: waits, prints the id, waits.

The first process connects and ends; the second gets its number (clone3(2) with set_tid); then the
parent, which has the connection, too, asks.
"""
import ctypes, os, signal, socket, struct, sys, time

CLONE3, SIGCHLD = 435, 17
libc = ctypes.CDLL(None, use_errno=True)
s = socket.socket()
print('ready', flush=True)
sys.stdin.readline()
first = os.fork()
if first == 0:
    s.connect(('169.254.169.254', 80))
    os._exit(0)
os.waitpid(first, 0)
# The kernel dates processes to a hundredth of a second.
time.sleep(0.05)
number = (ctypes.c_int * 1)(first)
arguments = struct.pack('=4Q6Q', 0, 0, 0, 0, SIGCHLD, 0, 0, 0, ctypes.addressof(number), 1)
second = libc.syscall(CLONE3, arguments, len(arguments))
if second == 0:
    os.closerange(0, 3)
    os.execvp('sleep', ['sleep', '600'])
assert second == first, os.strerror(ctypes.get_errno())
s.sendall(b'GET /latest/meta-data/instance-id HTTP/1.0\r\n\r\n')
print(first, flush=True)
sys.stdin.readline()
print(s.recv(100).split()[1].decode())
os.kill(second, signal.SIGKILL)
