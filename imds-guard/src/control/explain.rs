//! How a request would be judged that nobody has sent.

use clap::Args;
use hyper::{HeaderMap, Method, Uri, header::HeaderValue};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc};

use crate::{
    identify::Resolver,
    policy::{
        Ask, Caller, Explanation, Imds, Policy, Request, Subject, TOKEN_HEADER, TTL_HEADER,
        caller::{Container, Netns, Parent, Pod},
        hops,
    },
};

/// A request, and who sends it: a process that is there, or one that is made up.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Question {
    /// A process of this host
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// A program that the host has
    #[arg(long, conflicts_with = "pid")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exe: Option<String>,
    /// The program's digest
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Name of the thread
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comm: Option<String>,
    /// Name of the user
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// User id [default: 65534]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Name of the group
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Group id [default: 65534]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// systemd unit
    #[arg(long, value_name = "UNIT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub systemd_unit: Option<String>,
    /// Path of the cgroup
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// Id of the container
    #[arg(long, value_name = "ID")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_id: Option<String>,
    /// Image of the container
    #[arg(long, value_name = "IMAGE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_image: Option<String>,
    /// UID of the pod
    #[arg(long, value_name = "UID")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// Name of the pod
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Namespace of the pod
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Service account of the pod
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
    /// Label of the pod; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// Program of an ancestor
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ancestor_exe: Option<String>,
    /// Network hops to the guard [default: 1 on the host, 2 in other network namespaces]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hops: Option<u8>,
    /// In a network namespace other than the host's
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub other_netns: bool,
    /// Over IPv6
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ipv6: bool,
    /// Version of the protocol: v1, v2, or token for the request of a session token [default: v2]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub imds: Option<Imds>,
    /// Path [default: that of the instance id, or of session tokens]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// HTTP method [default: GET, or PUT for session tokens]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
}

/// Answers it.
///
/// # Errors
/// There is no such process, or such a request cannot be judged.
pub async fn explain(
    policy: &Policy,
    resolver: &Resolver,
    question: &Question,
) -> Result<(Caller, Explanation), String> {
    let caller = match question.pid {
        Some(pid) => {
            let rules = &policy.rules;
            let wanted = |caller: &Caller| {
                rules.wanted(&rules.candidates(&subject(question, caller)), caller)
            };
            let found = resolver.resolve_pid(pid, wanted).await;
            found.ok_or_else(|| format!("there is no process {pid}"))?
        }
        None => made_up(question),
    };
    let imds = question.imds.unwrap_or(Imds::V2);
    let default = match imds {
        Imds::Token => ("PUT", "/latest/api/token"),
        Imds::V1 | Imds::V2 => ("GET", "/latest/meta-data/instance-id"),
    };
    let method = question.method.as_deref().unwrap_or(default.0);
    let path = question.path.as_deref().unwrap_or(default.1);
    let parsed: Method = method
        .parse()
        .map_err(|_| format!("{method} is no method"))?;
    if (parsed == Method::PUT) != (imds == Imds::Token) {
        return Err("PUT is the method of requests for session tokens, and of no others".into());
    }
    let target: Uri = path.parse().map_err(|_| format!("{path} is no path"))?;
    let mut headers = HeaderMap::new();
    match imds {
        Imds::V1 => {}
        Imds::V2 => drop(headers.insert(TOKEN_HEADER, HeaderValue::from_static("x"))),
        Imds::Token => drop(headers.insert(TTL_HEADER, HeaderValue::from_static("60"))),
    }
    let request = Request::classify(&parsed, &target, &headers)
        .map_err(|malformed| format!("such a request is refused in every mode: {malformed}"))?;
    let ask = Ask {
        imds,
        method,
        path: &request.path,
    };
    let explanation = policy.explain(
        &subject(question, &caller),
        (&request, &ask),
        Timestamp::now(),
    );
    Ok((caller, explanation))
}

fn subject<'a>(question: &Question, caller: &'a Caller) -> Subject<'a> {
    Subject {
        caller,
        endpoint: if question.ipv6 { "ipv6" } else { "ipv4" },
        hops: question.hops.unwrap_or_else(|| {
            let is_host = caller.netns == Netns::Host;
            if is_host { hops(true, None) } else { 2 }
        }),
    }
}

/// A caller of whom everything is known, and has nothing that is not said.
fn made_up(question: &Question) -> Caller {
    const NOBODY: u32 = 65534;
    let question = question.clone();
    let label = |label: String| match label.split_once('=') {
        Some((key, value)) => (key.to_owned(), value.to_owned()),
        None => (label, String::new()),
    };
    let labels: BTreeMap<_, _> = question.labels.into_iter().map(label).collect();
    let is_pod = question.pod.is_some()
        || question.namespace.is_some()
        || question.service_account.is_some()
        || !labels.is_empty();
    let image = question.container_image;
    Caller {
        uid: question.uid.unwrap_or(NOBODY),
        gid: question.gid.unwrap_or(NOBODY),
        comm: question.comm.unwrap_or_default(),
        netns: if question.other_netns {
            Netns::Other
        } else {
            Netns::Host
        },
        exe_verified: question.exe.is_some(),
        exe: question.exe,
        exe_sha256: question.sha256,
        user: question.user,
        group: question.group,
        systemd_unit: question.systemd_unit,
        cgroup: question.cgroup,
        container_id: question.container_id,
        container: image.map(|image| {
            Arc::new(Container {
                name: None,
                image: Some(image),
            })
        }),
        pod_uid: question.pod_uid,
        pod: is_pod.then(|| {
            Arc::new(Pod {
                owner: None,
                name: question.pod.unwrap_or_default(),
                namespace: question.namespace.unwrap_or_default(),
                service_account: question.service_account,
                labels,
            })
        }),
        parents: question.ancestor_exe.map_or_else(Vec::new, |exe| {
            vec![Parent {
                pid: 0,
                exe: Some(exe),
                exe_verified: true,
            }]
        }),
        resolved: true,
        ..Caller::default()
    }
}
