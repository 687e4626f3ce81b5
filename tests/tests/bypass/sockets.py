"""Asks the metadata service as IMDSv1 over a TCP socket: usage WAY [ADDRESS].

Prints the way's own remark, if any, then the process id and what came of it: the status, or the
name of the error.
"""
import ctypes, errno, mmap, os, select, socket, struct, sys

way = sys.argv[1]
address = sys.argv[2] if len(sys.argv) > 2 else '169.254.169.254'
THERE = (address, 80)
FAMILY = socket.AF_INET6 if ':' in address else socket.AF_INET
REQUEST = b'GET /latest/meta-data/instance-id HTTP/1.0\r\n\r\n'
LISTENER = ('169.254.171.254', 254)
IPPROTO_MPTCP, MSG_FASTOPEN, TCP_FASTOPEN_CONNECT, TCP_FASTOPEN_NO_COOKIE = 262, 0x20000000, 30, 34
SO_MARK, SO_BINDTODEVICE = 36, 25
libc = ctypes.CDLL(None, use_errno=True)


def tcp():
    s = socket.socket(FAMILY, socket.SOCK_STREAM)
    s.settimeout(20)
    return s


def raw_address(host, port):
    if FAMILY == socket.AF_INET:
        return struct.pack('=H', FAMILY) + struct.pack('!H', port) + socket.inet_aton(host) + bytes(8)
    return (struct.pack('=H', FAMILY) + struct.pack('!HI', port, 0)
            + socket.inet_pton(FAMILY, host) + bytes(4))


def call(function, *arguments):
    result = function(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def dissolve(s):
    """connect(AF_UNSPEC): the socket is as new."""
    unspecified = struct.pack('=H14x', socket.AF_UNSPEC)
    call(libc.connect, s.fileno(), unspecified, len(unspecified))


def ring_connect(s, flags):
    """connect(2) by io_uring: a ring of one entry, laid out as in linux/io_uring.h."""
    IO_URING_SETUP, IO_URING_ENTER, IORING_OP_CONNECT, GETEVENTS = 425, 426, 16, 1
    parameters = ctypes.create_string_buffer(120)
    ring = call(libc.syscall, IO_URING_SETUP, 1, parameters)
    entries = struct.unpack_from('=2I', parameters.raw)
    submission = struct.unpack_from('=7I', parameters.raw, 40)
    completion = struct.unpack_from('=6I', parameters.raw, 80)
    queue = mmap.mmap(ring, submission[6] + entries[0] * 4)
    done = mmap.mmap(ring, completion[5] + entries[1] * 16, offset=0x8000000)
    slots = mmap.mmap(ring, entries[0] * 64, offset=0x10000000)
    to = ctypes.create_string_buffer(raw_address(*THERE))
    slots[:64] = struct.pack('=BBHiQQ40x', IORING_OP_CONNECT, flags, 0, s.fileno(), len(to) - 1,
                             ctypes.addressof(to))
    queue[submission[6]:submission[6] + 4] = bytes(4)
    queue[submission[1]:submission[1] + 4] = struct.pack('=I', 1)
    call(libc.syscall, IO_URING_ENTER, ring, 1, 1, GETEVENTS, None, 0)
    result, = struct.unpack_from('=i', done, completion[5] + 8)
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def connected():
    s = tcp()
    if way == 'plain':
        s.connect(THERE)
    elif way == 'mptcp':
        s = socket.socket(FAMILY, socket.SOCK_STREAM, IPPROTO_MPTCP)
        s.connect(THERE)
    elif way == 'fastopen':
        s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
        s.sendto(REQUEST, MSG_FASTOPEN, THERE)
    elif way == 'fastopen-connect':
        s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
        s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        s.connect(THERE)
        s.sendall(REQUEST)
    elif way in ('ring', 'ring-worker'):
        s.setblocking(True)
        IOSQE_ASYNC = 16
        ring_connect(s, IOSQE_ASYNC if way == 'ring-worker' else 0)
    elif way == 'nonblocking':
        s.setblocking(False)
        assert s.connect_ex(THERE) == errno.EINPROGRESS
        assert select.select([], [s], [], 20)[1]
        error = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        s.settimeout(20)
    elif way == 'bound':
        s.bind(('', 0))
        s.connect(THERE)
    elif way == 'again':
        s.connect(THERE)
        dissolve(s)
        s.connect(THERE)
    elif way == 'elsewhere-first':
        elsewhere = socket.create_server(('127.0.0.1', 0))
        s.connect(elsewhere.getsockname())
        dissolve(s)
        s.connect(THERE)
    elif way == 'marked':
        s.setsockopt(socket.SOL_SOCKET, SO_MARK, 0xa9fe)
        s.connect(THERE)
    elif way == 'device':
        s.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, b'eth0')
        s.connect(THERE)
    elif way == 'source-route':
        # Loose, over the service itself to its neighbour.
        s.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS,
                     bytes([131, 7, 4]) + socket.inet_aton('169.254.169.254') + b'\0')
        s.connect(('172.31.16.1', 80))
    elif way == 'source-route-by-host':
        s.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS,
                     bytes([131, 7, 4]) + socket.inet_aton('10.88.0.1') + b'\0')
        s.connect(THERE)
    elif way == 'zone':
        s.connect((address, 80, 0, socket.if_nametoindex('eth0')))
    elif way == 'resolved':
        info = socket.getaddrinfo(f'{address}%{socket.if_nametoindex("eth0")}', 80, type=socket.SOCK_STREAM)[0]
        s.connect(info[4])
    elif way == 'listener-after':
        s.connect(THERE)
        dissolve(s)
        s.connect(LISTENER)
    else:
        raise ValueError(way)
    return s


try:
    s = connected()
    if not way.startswith('fastopen'):
        s.sendall(REQUEST)
    answer = s.recv(65536)
    print(os.getpid(), answer.split()[1].decode() if answer else 'closed')
except OSError as error:
    print(os.getpid(), errno.errorcode.get(error.errno, error))
