"""A socket and processes that come apart: usage WAY CGROUP; asks as IMDSv1 when told to.

Prints what there is to know before, waits for a line, goes on, and prints what came of it.
"""
import array, errno, os, socket, sys

way = sys.argv[1]
cgroup = sys.argv[2] if len(sys.argv) > 2 else None
THERE = ('169.254.169.254', 80)
REQUEST = b'GET /latest/meta-data/instance-id HTTP/1.0\r\n\r\n'


def enter():
    with open(f'{cgroup}/cgroup.procs', 'w') as procs:
        procs.write('0')


def wait():
    sys.stdin.readline()


def say(*what):
    print(*what, flush=True)


def ask(s):
    try:
        s.sendall(REQUEST)
        answer = s.recv(65536)
        return answer.split()[1].decode() if answer else 'closed'
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))


s = socket.socket()
s.settimeout(20)
if way == 'older':  # Connected before somebody comes to guard it.
    s.connect(THERE)
    say('connected')
    wait()
    say(ask(s))
elif way == 'enter-then-connect':
    enter()
    say(os.getpid())
    s.connect(THERE)
    say(ask(s))
elif way == 'connect-then-enter':
    s.connect(THERE)
    enter()
    say(os.getpid())
    say(ask(s))
elif way == 'passed':  # To another process, in another cgroup, by SCM_RIGHTS.
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        enter()
        _, ancillary, _, _ = there.recvmsg(1, socket.CMSG_SPACE(4))
        descriptor = array.array('i', ancillary[0][2])[0]
        s = socket.socket(fileno=descriptor)
        s.settimeout(20)
        say(os.getpid())
        s.connect(THERE)
        say(ask(s))
        os._exit(0)
    here.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [s.fileno()]))])
    os.waitpid(child, 0)
elif way == 'inherited':  # The child asks over what the parent has connected.
    s.connect(THERE)
    child = os.fork()
    if child == 0:
        say(os.getppid())
        say(ask(s))
        os._exit(0)
    os.waitpid(child, 0)
elif way == 'dropped':  # Connected as root, asked as nobody.
    s.connect(THERE)
    os.setgid(65534)
    os.setuid(65534)
    say(os.getpid())
    say(ask(s))
else:
    raise ValueError(way)
