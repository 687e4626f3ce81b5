"""Speaks TCP without the kernel's: usage MEANS VERSION SOURCE_PORT [ADDRESS PORT].

Sends a SYN for the metadata service, or the given address, by the given means, and one to port 81, where nobody listens.
The refusal of the latter travels the same way and comes later, so that nothing has to be waited for
in vain. Prints `silence` if only that comes back; otherwise finishes the handshake, asks as IMDSv1,
and prints `answered` with the status, or `closed`.
"""
import errno, json, os, socket, struct, subprocess, sys

means, version, mine = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
# Packets that one CPU sends and receives stay in order.
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
FAMILY = socket.AF_INET if version == 4 else socket.AF_INET6
THERE, PORT = '169.254.169.254' if version == 4 else 'fd00:ec2::254', 80
if len(sys.argv) > 4:
    THERE, PORT = sys.argv[4], int(sys.argv[5])
ETHERTYPE = 0x0800 if version == 4 else 0x86dd
ARP = 0x0806
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
IPPROTO_RAW, ROUTING, FRAGMENT, DESTINATION = 255, 43, 44, 60
SOL_PACKET, PACKET_QDISC_BYPASS, PACKET_OUTGOING = 263, 20, 4


def ip(*arguments):
    return subprocess.run(['ip', f'-{version}', '-json', *arguments], check=True,
                          stdout=subprocess.PIPE).stdout


# The kernel, which knows nothing of this connection, would reset it.
ip('rule', 'add', 'blackhole', 'ipproto', str(socket.IPPROTO_TCP), 'sport', str(mine))
# Makes the neighbour known, too.
try:
    socket.create_connection((THERE, 81), timeout=20)
except ConnectionRefusedError:
    pass
route = json.loads(ip('route', 'get', THERE))[0]
HERE, GATEWAY, LINK = route['prefsrc'], route['gateway'], route['dev']
neighbours = json.loads(ip('neigh', 'show', GATEWAY, 'dev', LINK))
GATEWAY_MAC = bytes.fromhex(neighbours[0]['lladdr'].replace(':', ''))
here, there = socket.inet_pton(FAMILY, HERE), socket.inet_pton(FAMILY, THERE)


def checksum(data):
    data += b'\0' * (len(data) % 2)
    total = sum(struct.unpack(f'!{len(data) // 2}H', data))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff


def segment(port, flags, sequence, acknowledged=0, data=b''):
    head = struct.pack('!HHIIBBHHH', mine, port, sequence, acknowledged, 7 << 4, flags, 65535, 0, 0)
    head += b'\x01' * 8
    if version == 4:
        pseudo = here + there + struct.pack('!HH', 6, len(head + data))
    else:
        pseudo = here + there + struct.pack('!II', len(head + data), 6)
    return head[:16] + struct.pack('!H', checksum(pseudo + head + data)) + head[18:] + data


def ipv4(payload, options=b'', offset=0, more=False):
    head = struct.pack('!BBHHHBBH', 0x40 | (5 + len(options) // 4), 0,
                       20 + len(options) + len(payload), mine, offset // 8 | (0x2000 if more else 0),
                       64, 6, 0) + here + there + options
    return head[:10] + struct.pack('!H', checksum(head)) + head[12:] + payload


def ipv6(payload, protocol=6):
    return struct.pack('!IHBB', 6 << 28, len(payload), protocol, 64) + here + there + payload


def fragment6(payload, offset, more):
    head = struct.pack('!BBHI', 6, 0, offset | (1 if more else 0), mine)
    return ipv6(head + payload, FRAGMENT)


def packets(tcp, port):
    if port == 81 and means in ('fragments', 'extensions9'):  # What hides its port is always stopped.
        return [ipv4(tcp) if version == 4 else ipv6(tcp)]
    if means == 'fragments' and version == 4:
        return [ipv4(tcp[:8], more=True), ipv4(tcp[8:], offset=8)]
    if means == 'fragments':  # Receivers want the whole header in the first one.
        return [fragment6(tcp[:24], 0, True), fragment6(tcp[24:], 24, False)]
    if means == 'options':  # The longest header: the ports are not where they usually are.
        return [ipv4(tcp, options=b'\x01' * 40)]
    if means == 'routing':  # No segments left: this is the last hop.
        return [ipv6(bytes([6, 0, 0, 0, 0, 0, 0, 0]) + tcp, ROUTING)]
    if means.startswith('extensions'):
        count = int(means[10:])
        padding = bytes([1, 4, 0, 0, 0, 0])
        following = b''.join(bytes([next, 0]) + padding for next in [DESTINATION] * (count - 1) + [6])
        return [ipv6(following + tcp, DESTINATION)]
    return [ipv4(tcp) if version == 4 else ipv6(tcp)]


def frame(packet, port):
    tags = int(means[4:]) if means.startswith('vlan') else 0
    if port == 81 and tags > 2:
        tags = 0
    # Tags of network 0 say nothing but a priority: receivers take them off.
    head = GATEWAY_MAC + mac + b'\x81\0\0\0' * tags + struct.pack('!H', ETHERTYPE)
    return head + packet


listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
listener.bind((LINK, 3))
listener.settimeout(20)
mac = listener.getsockname()[4]

if means in ('raw', 'elsewhere', 'fragments', 'options', 'routing', 'extensions4', 'extensions9'):
    sender = socket.socket(FAMILY, socket.SOCK_RAW, IPPROTO_RAW)
    # What the kernel is told need not be what the header says.
    to = GATEWAY if means == 'elsewhere' else THERE
    transmit = lambda packet, _: sender.sendto(packet, (to, 0))
elif means == 'datagram':
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
    transmit = lambda packet, _: sender.sendto(packet, (LINK, ETHERTYPE, 0, 0, GATEWAY_MAC))
else:
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    if means == 'unqueued':
        sender.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
    told = ARP if means == 'lying' else ETHERTYPE
    transmit = lambda packet, port: sender.sendto(frame(packet, port), (LINK, told))


def send(port, *what):
    for packet in packets(segment(port, *what), port):
        try:
            transmit(packet, port)
        except OSError as error:  # How a cgroup's program and an interface's say no.
            if error.errno not in (errno.EPERM, errno.ENOBUFS):
                raise


def answers():
    """What comes back, as source port, flags, sequence and data."""
    while True:
        data, address = listener.recvfrom(65536)
        if address[2] == PACKET_OUTGOING or address[1] != ETHERTYPE:
            continue
        packet = data[14:]
        if version == 4:
            source, tcp = packet[12:16], packet[(packet[0] & 15) * 4:int.from_bytes(packet[2:4], 'big')]
        else:
            source, tcp = packet[8:24], packet[40:40 + int.from_bytes(packet[4:6], 'big')]
        protocol = packet[9] if version == 4 else packet[6]
        if source != there or protocol != 6:
            continue
        port, to, sequence, _, offset, flags = struct.unpack('!HHIIBB', tcp[:14])
        if to == mine:
            yield port, flags, sequence, tcp[(offset >> 4) * 4:]


send(PORT, SYN, 1000)
send(81, SYN, 1000)
for port, flags, sequence, data in answers():
    if port == 81 and flags & RST:
        print('silence')
        break
    if port == PORT and flags & SYN:
        request = b'GET /latest/meta-data/instance-id HTTP/1.0\r\n\r\n'
        send(PORT, ACK, 1001, sequence + 1)
        send(PORT, PSH | ACK, 1001, sequence + 1, request)
        for port, flags, sequence, data in answers():
            if port == PORT and (data or flags & (FIN | RST)):
                print('answered ' + data.split()[1].decode() if data else 'closed')
                break
        break
