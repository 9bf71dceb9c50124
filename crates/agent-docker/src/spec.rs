//! From what a session is to what the engine is asked for; pure, so that what is safe can be read off and tested.
//!
//! The defaults are all that is safe: every capability dropped, no new privileges, nothing of the host's shared,
//! ports on one named address, limits on memory, processors and processes. What a template asks for beyond that
//! must be allowed by the agent's configuration, and is refused by name otherwise.

use std::collections::HashMap;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Component, Path, PathBuf};

use bollard::models::{
    ContainerCreateBody, EndpointSettings, HostConfig, HostConfigLogConfig, Mount, MountType,
    MountVolumeOptions, NetworkingConfig, PortBinding, RestartPolicy, RestartPolicyNameEnum,
};
use regent_agent::runtime::{HibernateMode, SessionRef, StartSpec};
use regent_types::template::{ManifestMount, ManifestPort};

use crate::names::{Purpose, Record, Scope};
use crate::options::DockerOptions;

/// What a session needs at the engine.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The volumes that must be there, with their labels.
    pub(crate) volumes: Vec<(String, HashMap<String, String>)>,
    pub(crate) container: ContainerCreateBody,
}

/// Ports that one session may have published.
const MAX_PORTS: usize = 32;

/// What a container's log may take: two files of this size.
const LOG_FILE: &str = "8m";

/// Where the engine is, as far as binds matter.
#[derive(Debug, Clone, Default)]
pub(crate) struct Site {
    /// The engine's socket, which no session may have.
    pub(crate) socket: Option<PathBuf>,
    /// Whether the engine writes logs as files that would grow for ever.
    pub(crate) bound_logs: bool,
}

/// Plans a session; the error says what of it is not allowed or cannot be, for a person.
pub(crate) fn plan(
    options: &DockerOptions,
    site: &Site,
    scope: &Scope,
    spec: &StartSpec,
    image: &str,
    network: &str,
) -> Result<Plan, String> {
    spec.check_env()?;
    let mut env: Vec<String> = Vec::new();
    let ours = spec.regent_env();
    for (name, value) in &spec.env {
        if !ours.iter().any(|(own, _)| own == name) {
            env.push(format!("{name}={value}"));
        }
    }
    env.extend(ours.iter().map(|(name, value)| format!("{name}={value}")));
    if let Some(port) = spec.port.as_ref().and_then(|port| port.container_port) {
        env.push(format!("PORT={port}"));
    }
    let (volumes, mounts) = mounts(options, site, scope, spec)?;
    let ports = &spec.container.ports;
    if ports.len() > MAX_PORTS {
        // Each is a process of the engine's on the host.
        return Err(format!(
            "the template has {} ports; {MAX_PORTS} can be published",
            ports.len()
        ));
    }
    let record = Record {
        hibernate: spec.hibernate.unwrap_or(HibernateMode::Restart),
        port: ports.first().map(port_name).transpose()?,
        home: spec.persistent_home.then(|| scope.home(spec)),
        metadata: spec.metadata.clone(),
    };
    let words = command(spec);
    let aliases = Some(vec![spec.session.to_string()]);
    let endpoint = EndpointSettings {
        aliases,
        ..EndpointSettings::default()
    };
    let container = ContainerCreateBody {
        hostname: Some(spec.session.to_string()),
        image: Some(image.to_owned()),
        user: spec.container.security.run_as_user.map(|user| user.to_string()),
        env: Some(env),
        // Without a command the image's own entry point runs, with the template's arguments if it has any.
        entrypoint: words.first().map(|program| vec![program.clone()]),
        cmd: Some(if words.is_empty() {
            spec.args.clone()
        } else {
            words[1..].to_vec()
        })
        .filter(|cmd| !cmd.is_empty()),
        labels: Some(scope.container_labels(spec, &record)),
        exposed_ports: Some(ports.iter().map(port_name).collect::<Result<_, _>>()?),
        host_config: Some(host_config(options, site, spec, network, mounts)?),
        networking_config: Some(NetworkingConfig {
            endpoints_config: Some(HashMap::from([(network.to_owned(), endpoint)])),
        }),
        ..ContainerCreateBody::default()
    };
    Ok(Plan { volumes, container })
}

/// The program and its arguments, when the template names a program.
fn command(spec: &StartSpec) -> Vec<String> {
    if spec.command.is_empty() {
        return Vec::new();
    }
    std::iter::once(spec.command.clone())
        .chain(spec.args.iter().cloned())
        .collect()
}

fn host_config(
    options: &DockerOptions,
    site: &Site,
    spec: &StartSpec,
    network: &str,
    mounts: Vec<Mount>,
) -> Result<HostConfig, String> {
    let security = &spec.container.security;
    let memory = spec
        .memory_bytes
        .map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
    let binding = || {
        Some(vec![PortBinding {
            host_ip: Some(options.publish.to_string()),
            host_port: None,
        }])
    };
    let tmpfs = HashMap::from(["/tmp", "/run"].map(|at| (at.to_owned(), "rw,nosuid,nodev".to_owned())));
    let log = HostConfigLogConfig {
        typ: Some("json-file".to_owned()),
        config: Some(HashMap::from([
            ("max-size".to_owned(), LOG_FILE.to_owned()),
            ("max-file".to_owned(), "2".to_owned()),
        ])),
    };
    Ok(HostConfig {
        network_mode: Some(network.to_owned()),
        mounts: Some(mounts),
        // The engine takes no less than a hundredth of a processor.
        nano_cpus: spec
            .cpu_milli
            .map(|milli| i64::try_from(milli.max(10).saturating_mul(1_000_000)).unwrap_or(i64::MAX)),
        memory,
        // No swap beyond it, or the limit is none.
        memory_swap: memory,
        pids_limit: Some(i64::from(options.pids_limit)),
        port_bindings: Some(
            spec.container
                .ports
                .iter()
                .map(|port| Ok((port_name(port)?, binding())))
                .collect::<Result<_, String>>()?,
        ),
        // A session that ends is over: the control plane is told, and decides whether another generation starts. An
        // engine that started it again would hide the end, and could run it beside the next generation.
        restart_policy: Some(RestartPolicy {
            name: Some(RestartPolicyNameEnum::NO),
            maximum_retry_count: None,
        }),
        privileged: Some(false),
        cap_drop: Some(vec!["ALL".to_owned()]),
        cap_add: Some(capabilities(options, &security.capabilities)?),
        security_opt: Some(vec!["no-new-privileges:true".to_owned()]),
        readonly_rootfs: Some(security.read_only_root_filesystem),
        tmpfs: security.read_only_root_filesystem.then_some(tmpfs),
        ipc_mode: Some("private".to_owned()),
        publish_all_ports: Some(false),
        log_config: site.bound_logs.then_some(log),
        ..HostConfig::default()
    })
}

fn capabilities(options: &DockerOptions, asked: &[String]) -> Result<Vec<String>, String> {
    let plain = |name: &str| {
        let name = name.to_ascii_uppercase();
        name.strip_prefix("CAP_").map_or(name.clone(), str::to_owned)
    };
    let allowed: Vec<String> = options
        .allowed_capabilities
        .iter()
        .map(|name| plain(name))
        .collect();
    asked
        .iter()
        .map(|name| match plain(name) {
            name if allowed.contains(&name) => Ok(name),
            name => Err(format!(
                "the template asks for the capability {name}, which this agent does not allow (docker-allow-capability)"
            )),
        })
        .collect()
}

fn port_name(port: &ManifestPort) -> Result<String, String> {
    let protocol = port.protocol.to_ascii_lowercase();
    match protocol.as_str() {
        _ if port.container_port == 0 => Err("port 0 cannot be published".to_owned()),
        "tcp" | "udp" | "sctp" => Ok(format!("{}/{protocol}", port.container_port)),
        "" => Ok(format!("{}/tcp", port.container_port)),
        _ => Err(format!("{:?} is not a protocol: TCP, UDP or SCTP", port.protocol)),
    }
}

type Labels = HashMap<String, String>;
type Volumes = Vec<(String, Labels)>;

fn mounts(
    options: &DockerOptions,
    site: &Site,
    scope: &Scope,
    spec: &StartSpec,
) -> Result<(Volumes, Vec<Mount>), String> {
    let session: SessionRef = spec.session_ref();
    let files = scope.volume_labels(&session, Purpose::Files);
    let home = if spec.persistent_home {
        (scope.home(spec), scope.home_labels(&spec.user))
    } else {
        (
            scope.volume(&spec.session, spec.generation, "home"),
            files.clone(),
        )
    };
    let home_path = spec.container.home_path(&options.home_path);
    if spec.container.mounts.len() - spec.container.other_mounts().count() > 1 {
        return Err("the template mounts the home more than once".to_owned());
    }
    let mut mounts = vec![mount(MountType::VOLUME, &home.0, home_path, false, &home.1)?];
    let mut volumes = vec![home];
    for one in spec.container.other_mounts() {
        if let Some(host) = &one.host_path {
            let folder = bind(options, site, host, one)?;
            mounts.push(mount(
                MountType::BIND,
                &folder,
                &one.mount_path,
                one.read_only,
                &files,
            )?);
        } else {
            // `v-` keeps a volume called `home` or `asleep-1` from what Regent itself names so.
            let name = scope.volume(&spec.session, spec.generation, &format!("v-{}", one.name));
            mounts.push(mount(
                MountType::VOLUME,
                &name,
                &one.mount_path,
                one.read_only,
                &files,
            )?);
            volumes.push((name, files.clone()));
        }
    }
    Ok((volumes, mounts))
}

/// Where nothing of a session may be mounted: what confines it is there.
const NO_MOUNTS: [&str; 3] = ["/proc", "/sys", "/dev"];

fn mount(
    typ: MountType,
    source: &str,
    target: &str,
    read_only: bool,
    labels: &Labels,
) -> Result<Mount, String> {
    let path = Path::new(target);
    if !is_plain(path) || path == Path::new("/") {
        return Err(format!(
            "the volume mount {target:?} is not an absolute path below /"
        ));
    }
    if NO_MOUNTS.iter().any(|folder| path.starts_with(folder)) {
        return Err(format!("nothing can be mounted at {target:?}"));
    }
    Ok(Mount {
        typ: Some(typ),
        source: Some(source.to_owned()),
        target: Some(target.to_owned()),
        read_only: Some(read_only),
        // The engine makes a volume that went away again, and it would be nobody's without these.
        volume_options: (typ == MountType::VOLUME).then(|| MountVolumeOptions {
            labels: Some(labels.clone()),
            ..MountVolumeOptions::default()
        }),
        ..Mount::default()
    })
}

/// An absolute path without detours.
fn is_plain(path: &Path) -> bool {
    path.is_absolute()
        && !path
            .components()
            .any(|part| matches!(part, Component::ParentDir | Component::CurDir))
}

/// Sockets of engines, which no session may have, whichever of them this agent uses.
const SOCKETS: [&str; 4] = [
    "/run/docker.sock",
    "/var/run/docker.sock",
    "/run/containerd",
    "/run/podman",
];

/// Checks a bind, and gives the folder that is meant, links followed. What this agent cannot look at it cannot allow.
fn bind(options: &DockerOptions, site: &Site, host: &str, one: &ManifestMount) -> Result<String, String> {
    let asked = Path::new(host);
    let not_allowed = || {
        format!(
            "the template asks for the folder {host:?} of the host at {}, which this agent does not allow (docker-allow-bind)",
            one.mount_path
        )
    };
    if !is_plain(asked) {
        return Err(not_allowed());
    }
    let real = asked
        .canonicalize()
        .map_err(|error| format!("{}: the agent cannot look at it: {error}", not_allowed()))?;
    let below = |folder: &PathBuf| folder.canonicalize().is_ok_and(|folder| real.starts_with(folder));
    if !options.allowed_binds.iter().any(below) {
        return Err(not_allowed());
    }
    let sockets = SOCKETS.iter().map(Path::new).chain(site.socket.as_deref());
    let holds = |socket: &Path| {
        let target = socket.canonicalize();
        [Some(socket), target.as_deref().ok()]
            .into_iter()
            .flatten()
            .any(|socket| socket.starts_with(&real) || real.starts_with(socket))
    };
    let is_socket = real.metadata().is_ok_and(|found| found.file_type().is_socket());
    if is_socket || sockets.into_iter().any(holds) {
        return Err(format!(
            "{host:?} is or holds a socket of the engine, which no session may have"
        ));
    }
    real.into_os_string().into_string().map_err(|_| not_allowed())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{IpAddr, Ipv4Addr};
    use std::time::Duration;

    use regent_agent::runtime::{ContainerSpec, PortSpec};
    use regent_types::template::ManifestSecurity;
    use regent_types::{AgentId, ClusterId, SessionName, TemplateName, Token, UserName};

    use super::*;

    fn spec() -> StartSpec {
        StartSpec {
            session: SessionName::new("alice-web-1").unwrap(),
            generation: 3,
            token: Token(7),
            agent: AgentId::new("a").unwrap(),
            user: UserName::new("Alice@example.org").unwrap(),
            template: TemplateName::new("web").unwrap(),
            image: Some("web:1".to_owned()),
            command: String::new(),
            args: vec![],
            env: BTreeMap::from([
                ("A".to_owned(), "b".to_owned()),
                ("REGENT_AGENT".to_owned(), "liar".to_owned()),
            ]),
            cpu_milli: Some(250),
            memory_bytes: Some(64 << 20),
            persistent_home: false,
            port: Some(PortSpec {
                container_port: Some(3000),
                ready_within: Duration::ZERO,
            }),
            hibernate: None,
            container: ContainerSpec {
                ports: vec![ManifestPort {
                    name: String::new(),
                    container_port: 3000,
                    protocol: "TCP".to_owned(),
                }],
                ..ContainerSpec::default()
            },
            metadata: BTreeMap::new(),
        }
    }

    fn options() -> DockerOptions {
        DockerOptions::new(AgentId::new("a").unwrap(), "/nowhere")
    }

    fn planned(options: &DockerOptions, spec: &StartSpec) -> Result<Plan, String> {
        let site = Site {
            socket: Some("/run/docker.sock".into()),
            bound_logs: true,
        };
        let scope = Scope {
            agent: options.agent.clone(),
            cluster: ClusterId::new("c").unwrap(),
        };
        plan(options, &site, &scope, spec, "web:1", "net")
    }

    #[test]
    fn a_session_gets_nothing_of_the_host_and_every_limit() {
        let plan = planned(&options(), &spec()).unwrap();
        let host = plan.container.host_config.unwrap();
        assert_eq!(host.privileged, Some(false));
        assert_eq!(host.cap_drop.unwrap(), ["ALL"]);
        assert_eq!(host.cap_add.unwrap(), [""; 0]);
        assert_eq!(host.security_opt.unwrap(), ["no-new-privileges:true"]);
        assert_eq!(host.network_mode.as_deref(), Some("net"));
        assert_eq!(host.ipc_mode.as_deref(), Some("private"));
        assert!(host.pid_mode.is_none() && host.uts_mode.is_none() && host.userns_mode.is_none());
        assert!(host.binds.is_none() && host.devices.is_none());
        assert_eq!(
            (host.nano_cpus, host.memory, host.memory_swap),
            (Some(250_000_000), Some(64 << 20), Some(64 << 20))
        );
        assert_eq!(host.pids_limit, Some(512));
        let published = host.port_bindings.unwrap()["3000/tcp"].clone().unwrap();
        assert_eq!(published[0].host_ip.as_deref(), Some("127.0.0.1"));
        assert_eq!(host.restart_policy.unwrap().name, Some(RestartPolicyNameEnum::NO));
        assert!(host.log_config.is_some());
        let env = plan.container.env.unwrap();
        assert!(env.contains(&"A=b".to_owned()) && env.contains(&"REGENT_AGENT=a".to_owned()));
        assert!(!env.contains(&"REGENT_AGENT=liar".to_owned()), "{env:?}");
        assert_eq!((plan.container.entrypoint, plan.container.cmd), (None, None));
    }

    #[test]
    fn a_command_replaces_the_entry_point_and_arguments_alone_do_not() {
        let with = |command: &str, args: &[&str]| {
            let spec = StartSpec {
                command: command.to_owned(),
                args: args.iter().map(|word| (*word).to_owned()).collect(),
                ..spec()
            };
            let container = planned(&options(), &spec).unwrap().container;
            (
                container.entrypoint.unwrap_or_default(),
                container.cmd.unwrap_or_default(),
            )
        };
        assert_eq!(
            with("sh", &["-c", "x"]),
            (vec!["sh".to_owned()], vec!["-c".to_owned(), "x".to_owned()])
        );
        assert_eq!(with("", &["x"]), (vec![], vec!["x".to_owned()]));
    }

    #[test]
    fn what_goes_beyond_the_defaults_must_be_allowed_by_name() {
        let asking = |capability: &str| StartSpec {
            container: ContainerSpec {
                security: ManifestSecurity {
                    capabilities: vec![capability.to_owned()],
                    ..ManifestSecurity::default()
                },
                ..ContainerSpec::default()
            },
            ..spec()
        };
        let refused = planned(&options(), &asking("cap_sys_admin")).unwrap_err();
        assert!(
            refused.contains("SYS_ADMIN") && refused.contains("docker-allow-capability"),
            "{refused}"
        );
        let allowing = DockerOptions {
            allowed_capabilities: vec!["NET_BIND_SERVICE".to_owned()],
            ..options()
        };
        let plan = planned(&allowing, &asking("CAP_NET_BIND_SERVICE")).unwrap();
        assert_eq!(
            plan.container.host_config.unwrap().cap_add.unwrap(),
            ["NET_BIND_SERVICE"]
        );
        planned(&allowing, &asking("NET_ADMIN")).unwrap_err();
    }

    #[test]
    fn binds_stay_below_the_allowed_folders_and_never_hold_a_socket() {
        let base = tempfile::tempdir().unwrap();
        let allowed = base.path().join("allowed");
        std::fs::create_dir_all(allowed.join("data")).unwrap();
        std::os::unix::fs::symlink("/etc", allowed.join("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(allowed.join("socket")).unwrap();
        let options = DockerOptions {
            allowed_binds: vec![allowed.clone(), "/run".into()],
            ..options()
        };
        let asking = |host: &str| {
            let mounts = vec![ManifestMount {
                name: "data".to_owned(),
                mount_path: "/data".to_owned(),
                read_only: true,
                host_path: Some(host.to_owned()),
            }];
            let container = ContainerSpec {
                mounts,
                ..ContainerSpec::default()
            };
            planned(&options, &StartSpec { container, ..spec() })
        };
        let inside = |name: &str| allowed.join(name).to_str().unwrap().to_owned();
        let plan = asking(&inside("data")).unwrap();
        let mounts = plan.container.host_config.unwrap().mounts.unwrap();
        assert_eq!(
            (mounts[1].typ, mounts[1].read_only),
            (Some(MountType::BIND), Some(true))
        );
        let beside = format!("{}-beside", allowed.display());
        for bad in [
            "/etc",
            "allowed",
            &inside("../x"),
            &inside("link"),
            &beside,
            &inside("none"),
        ] {
            let refused = asking(bad).unwrap_err();
            assert!(refused.contains("docker-allow-bind"), "{bad}: {refused}");
        }
        for socket in ["/run", &inside("socket")] {
            let refused = asking(socket).unwrap_err();
            assert!(refused.contains("socket"), "{socket}: {refused}");
        }
    }

    #[test]
    fn nothing_is_mounted_over_what_confines_and_no_home_twice() {
        let asking = |places: &[(&str, &str)]| {
            let mount = |(name, at): &(&str, &str)| ManifestMount {
                name: (*name).to_owned(),
                mount_path: (*at).to_owned(),
                read_only: false,
                host_path: None,
            };
            let container = ContainerSpec {
                mounts: places.iter().map(mount).collect(),
                ..ContainerSpec::default()
            };
            planned(&options(), &StartSpec { container, ..spec() }).map(drop)
        };
        asking(&[("home", "/home/me"), ("data", "/data")]).unwrap();
        for bad in [
            "/",
            "data",
            "/proc",
            "/proc/sys",
            "/sys/fs/cgroup",
            "/dev/shm",
            "/x/../proc",
        ] {
            asking(&[("data", bad)]).unwrap_err();
        }
        assert!(
            asking(&[("home", "/a"), ("user-home", "/b")])
                .unwrap_err()
                .contains("more than once")
        );
        let ports = vec![spec().container.ports[0].clone(); MAX_PORTS + 1];
        let container = ContainerSpec {
            ports,
            ..ContainerSpec::default()
        };
        assert!(
            planned(&options(), &StartSpec { container, ..spec() })
                .unwrap_err()
                .contains("ports")
        );
    }

    #[test]
    fn homes_persist_by_user_and_template_and_else_go_with_the_generation() {
        let names = |persistent_home| {
            let spec = StartSpec {
                persistent_home,
                ..spec()
            };
            let plan = planned(&options(), &spec).unwrap();
            plan.volumes.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert!(
            names(true)[0].starts_with("regent-home-alice-example-org-web-"),
            "{:?}",
            names(true)
        );
        assert!(
            names(false)[0].starts_with("regent-alice-web-1-g3-"),
            "{:?}",
            names(false)
        );
        let on_all = DockerOptions {
            publish: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            ..options()
        };
        let host = planned(&on_all, &spec()).unwrap().container.host_config.unwrap();
        let published = host.port_bindings.unwrap()["3000/tcp"].clone().unwrap();
        assert_eq!(
            published[0].host_ip.as_deref(),
            Some("0.0.0.0"),
            "only when it is asked for by name"
        );
    }
}
