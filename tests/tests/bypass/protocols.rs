//! Other transport protocols to the same address and port.

use imds_guard::{
    lab::Place,
    policy::Verdict,
    record::{Endpoint, Layer},
};

use super::{assert_untouched, attack, enforced, packet, room};

/// Sends something, and says what the kernel said.
const SCRIPT: &str = r"
import errno, socket, sys
kind, protocol, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
try:
    s = socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET, kind, protocol)
    s.setblocking(False)
    s.connect((address, 80))
    s.send(b'GET / HTTP/1.0\r\n\r\n')
    print('sent')
except OSError as error:
    print(errno.errorcode[error.errno])
";

/// Means of the kernel, with their numbers, and whether every kernel has them.
const PROTOCOLS: [(&str, u32, u32, bool); 5] = [
    ("udp", 2, 17, true),
    ("udplite", 2, 136, false),
    ("sctp", 1, 132, false),
    ("dccp", 6, 33, false),
    // Can ask for nothing, and passes: `ping` still works.
    ("icmp", 3, 1, true),
];

/// C9: protocols that the service does not speak. Those that the kernel lacks cannot be used.
#[test]
fn c9_other_transport_protocols() {
    let sandbox = enforced();
    for place in [Place::Host, Place::Container] {
        for (name, kind, protocol, everywhere) in PROTOCOLS {
            for address in ["169.254.169.254", "fd00:ec2::254"] {
                let arguments = [&kind.to_string(), &protocol.to_string(), address];
                let said = attack(room(&sandbox, place), SCRIPT, &arguments);
                if said == "EPROTONOSUPPORT" || said == "ESOCKTNOSUPPORT" {
                    assert!(!everywhere, "this kernel has no {name}");
                    continue;
                }
                if name == "icmp" {
                    assert_eq!(said, "sent");
                    continue;
                }
                // Some send more than once.
                let seen = loop {
                    let seen = packet(&sandbox);
                    if seen.protocol == name
                        && (seen.endpoint == Endpoint::Ipv6) == (address.contains(':'))
                    {
                        break seen;
                    }
                };
                assert_eq!(
                    (seen.layer, seen.verdict),
                    (Layer::Backstop, Verdict::Deny),
                    "{said}"
                );
            }
        }
    }
    assert_untouched(&sandbox);
}
