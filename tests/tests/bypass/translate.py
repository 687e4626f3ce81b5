"""Makes the kernel of this network namespace translate: usage ADDRESS PORT.

Every connection made here goes to that address and port, by one rule of nf_tables, spoken to in its
own tongue (linux/netfilter/nf_tables.h): nft(8) is not on every machine.
"""
import socket, struct, sys

SUBSYSTEM, NEWTABLE, NEWCHAIN, NEWRULE = 10, 0, 3, 6
BATCH_BEGIN, BATCH_END = 16, 17
REQUEST, ACK, CREATE = 1, 4, 0x400
NETLINK_NETFILTER, NFPROTO_IPV4, LOCAL_OUT, BEFORE_FILTERS = 12, 2, 3, -100
DNAT = 1


def attribute(kind, value):
    return struct.pack('=HH', 4 + len(value), kind) + value + bytes(-len(value) % 4)


def number(kind, value):
    return attribute(kind, struct.pack('!i', value))


def text(kind, value):
    return attribute(kind, value.encode() + b'\0')


def nested(kind, *attributes):
    return attribute(0x8000 | kind, b''.join(attributes))


def message(kind, flags, sequence, *attributes, resource=0):
    body = struct.pack('!BBH', NFPROTO_IPV4 if attributes else 0, 0, resource) + b''.join(attributes)
    return struct.pack('=IHHII', 16 + len(body), kind, flags, sequence, 0) + body


def of_tables(kind, sequence, *attributes):
    return message(SUBSYSTEM << 8 | kind, REQUEST | ACK | CREATE, sequence, *attributes)


def expression(name, *attributes):
    return nested(1, text(1, name), nested(2, *attributes))


def load(register, value):
    return expression('immediate', number(1, register), nested(2, attribute(1, value)))


to = socket.inet_aton(sys.argv[1]), struct.pack('!H', int(sys.argv[2]))
batch = b''.join([
    message(BATCH_BEGIN, REQUEST, 0, resource=SUBSYSTEM),
    of_tables(NEWTABLE, 1, text(1, 'attack')),
    of_tables(NEWCHAIN, 2, text(1, 'attack'), text(3, 'out'),
              nested(4, number(1, LOCAL_OUT), number(2, BEFORE_FILTERS)), text(7, 'nat')),
    of_tables(NEWRULE, 3, text(1, 'attack'), text(2, 'out'), nested(
        4, load(1, to[0]), load(2, to[1]),
        expression('nat', number(1, DNAT), number(2, NFPROTO_IPV4), number(3, 1), number(5, 2)))),
    message(BATCH_END, REQUEST, 4, resource=SUBSYSTEM),
])
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
netlink.bind((0, 0))
netlink.settimeout(20)
netlink.send(batch)
for _ in range(3):
    answer = netlink.recv(65536)
    error, = struct.unpack_from('=i', answer, 16)
    if error:
        raise OSError(-error, 'nf_tables refuses; does this kernel have nf_tables and its nat?')
