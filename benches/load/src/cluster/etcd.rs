//! Three real members of etcd, as Debian ships it, with its defaults.

use std::path::Path;

use anyhow::Context as _;
use bytes::Bytes;

use super::{MEMBERS, Member, ports, until};
use crate::grpc::Channel;
use crate::rpc::{PutRequest, PutResponse, StatusRequest, StatusResponse};

/// Puts that are under way at a time while the keys are made.
const PREPARING: usize = 64;

/// The cluster.
pub(crate) struct Etcd {
    pub(crate) members: Vec<Member>,
    pub(crate) version: String,
    pub(crate) records: usize,
}

impl Etcd {
    /// Where the program is, if it is installed.
    pub(crate) fn program() -> Option<std::path::PathBuf> {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path)
            .map(|folder| folder.join("etcd"))
            .find(|etcd| etcd.is_file())
    }

    pub(super) async fn start(folder: &Path) -> anyhow::Result<Self> {
        let program = Self::program()
            .context("etcd-server is not installed")?
            .display()
            .to_string();
        let ports = ports::choose(2 * MEMBERS)?;
        let (clients, peers) = ports.split_at(MEMBERS);
        let cluster: Vec<String> = (0..MEMBERS)
            .map(|n| format!("m{n}=http://127.0.0.1:{}", peers[n]))
            .collect();
        let mut members = Vec::new();
        for n in 0..MEMBERS {
            let (client, peer) = (
                format!("http://127.0.0.1:{}", clients[n]),
                format!("http://127.0.0.1:{}", peers[n]),
            );
            let data = folder.join(format!("m{n}"));
            let flags = [
                ("--name", format!("m{n}")),
                ("--data-dir", data.display().to_string()),
                ("--listen-client-urls", client.clone()),
                ("--advertise-client-urls", client),
                ("--listen-peer-urls", peer.clone()),
                ("--initial-advertise-peer-urls", peer),
                ("--initial-cluster", cluster.join(",")),
                ("--initial-cluster-state", "new".to_owned()),
                ("--initial-cluster-token", format!("bench-{}", std::process::id())),
            ];
            let mut command = vec![program.clone()];
            command.extend(
                flags
                    .into_iter()
                    .flat_map(|(flag, value)| [flag.to_owned(), value]),
            );
            let log = folder.join(format!("m{n}.log"));
            members.push(Member::new(clients[n], data, command, log)?);
        }
        let mut etcd = Self {
            members,
            version: String::new(),
            records: 0,
        };
        etcd.ready().await?;
        etcd.version = etcd.status(0).await?.version;
        Ok(etcd)
    }

    /// Waits until every member follows a leader and answers a read.
    pub(super) async fn ready(&mut self) -> anyhow::Result<()> {
        for n in 0..self.members.len() {
            until("a member of etcd", async || {
                self.members[n].check()?;
                Ok(self.status(n).await.is_ok_and(|status| status.leader != 0))
            })
            .await?;
        }
        Ok(())
    }

    pub(crate) async fn status(&self, member: usize) -> anyhow::Result<StatusResponse> {
        let channel = Channel::open(self.members[member].address).await?;
        channel
            .once("/etcdserverpb.Maintenance/Status", &StatusRequest {})
            .await
    }

    pub(super) async fn leader(&self) -> anyhow::Result<usize> {
        for n in 0..self.members.len() {
            let Ok(status) = self.status(n).await else {
                continue;
            };
            if status.leader != 0
                && status
                    .header
                    .is_some_and(|header| header.member_id == status.leader)
            {
                return Ok(n);
            }
        }
        anyhow::bail!("no member leads")
    }

    /// The key of a record.
    pub(crate) fn key(n: usize) -> Bytes {
        Bytes::from(format!("bench/{n:08}"))
    }

    /// Puts the keys that are missing.
    pub(super) async fn prepare(&mut self, records: usize) -> anyhow::Result<()> {
        let channel = Channel::open(self.members[0].address).await?;
        let mut tasks = Vec::new();
        for task in 0..PREPARING {
            let mut put = channel.method::<PutRequest, PutResponse>("/etcdserverpb.KV/Put")?;
            let from = self.records + task;
            tasks.push(tokio::spawn(async move {
                for n in (from..records).step_by(PREPARING) {
                    put.call(&PutRequest {
                        key: Self::key(n),
                        value: Bytes::from(vec![b'v'; 256]),
                        lease: 0,
                    })
                    .await?;
                }
                anyhow::Ok(())
            }));
        }
        for task in tasks {
            task.await??;
        }
        self.records = self.records.max(records);
        Ok(())
    }
}
