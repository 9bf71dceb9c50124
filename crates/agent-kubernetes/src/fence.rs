//! The fence of an agent's target: a `ConfigMap` with the highest token that anybody has acted under here.
//!
//! Invariant: the token only grows, and it is there before the first action under it. The same `ConfigMap` is
//! what the target is known by: whoever finds the one finds the other, so two replicas have the same runtime id
//! exactly if they see the same sessions.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use kube::api::{Api, Patch, PostParams};
use regent_agent::fence::FenceError;
use regent_agent::names::{MAX_LABEL, dns_label};
use regent_agent::runtime::RuntimeError;
use regent_types::{AgentId, Token};
use serde_json::json;

use crate::api::{self, Space, answer, named};
use crate::change::TRIES;
use crate::names::{self, MANAGER, Scope, annotation, label};
use crate::objects::token_of;

/// The `ConfigMap` of an agent.
#[derive(Debug, Clone)]
pub(crate) struct Fence {
    config_maps: Api<ConfigMap>,
    deployments: Api<Deployment>,
    name: String,
    agent: AgentId,
}

impl Fence {
    pub(crate) fn new(space: &Space, agent: &AgentId) -> Self {
        Self {
            config_maps: space.config_maps(),
            deployments: space.deployments(),
            name: names::fence(agent),
            agent: agent.clone(),
        }
    }

    /// What identifies the target: the uid of the `ConfigMap`, which is made if it is missing.
    pub(crate) async fn identity(&self) -> Result<String, RuntimeError> {
        for _ in 0..TRIES {
            if let Some(found) = api::get(&self.config_maps, &self.name).await? {
                return Ok(found.uid().unwrap_or_default());
            }
            self.create(BTreeMap::new()).await?;
        }
        Err(self.contended())
    }

    /// Lets an action under `token` go on, or refuses it. A token higher than any before is written first.
    pub(crate) async fn admit(&self, scope: &Scope, token: Token) -> Result<(), RuntimeError> {
        let key = names::fence_annotation(scope);
        for _ in 0..TRIES {
            let Some(found) = api::get(&self.config_maps, &self.name).await? else {
                self.make_again(scope, &key).await?;
                continue;
            };
            let highest = self.read(&found, &key)?;
            if token < highest {
                return Err(FenceError::Fenced {
                    asked: token,
                    highest,
                }
                .into());
            }
            if token == highest {
                return Ok(());
            }
            let patch = Patch::Merge(json!({ "metadata": {
                "resourceVersion": found.resource_version(), "annotations": { key.as_str(): token.to_string() },
            } }));
            let how = api::patching();
            match answer(self.config_maps.patch(&self.name, &how, &patch)).await {
                Ok(_) => {
                    tracing::info!(%token, previous = %highest, "fence raised");
                    return Ok(());
                }
                Err(error) if error.is_conflict() || error.is_not_found() => {}
                Err(error) => return Err(error.at(format!("cannot raise the fence {}", self.name))),
            }
        }
        Err(self.contended())
    }

    /// Somebody deleted it. What it knew is on the objects, too.
    async fn make_again(&self, scope: &Scope, key: &str) -> Result<(), RuntimeError> {
        let deployments = api::list(&self.deployments, &scope.selector()).await?;
        let highest = deployments
            .iter()
            .map(|deployment| token_of(deployment.metadata.annotations.as_ref()))
            .max()
            .unwrap_or_default();
        tracing::warn!(fence = self.name, %highest, "the fence was deleted and is made again from what runs");
        self.create(BTreeMap::from([(key.to_owned(), highest.to_string())]))
            .await
    }

    async fn create(&self, mut annotations: BTreeMap<String, String>) -> Result<(), RuntimeError> {
        annotations.insert(annotation::AGENT.to_owned(), self.agent.to_string());
        let labels = [
            (label::MANAGED_BY, "regent".to_owned()),
            (label::AGENT, dns_label(self.agent.as_str(), MAX_LABEL)),
        ];
        let mut map = ConfigMap::default();
        map.metadata.name = Some(self.name.clone());
        map.metadata.labels = Some(labels.map(|(name, value)| (name.to_owned(), value)).into());
        map.metadata.annotations = Some(annotations);
        let params = PostParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PostParams::default()
        };
        match answer(self.config_maps.create(&params, &map)).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_already_exists() => Ok(()),
            Err(error) => Err(error.at(format!("cannot create {}", named::<ConfigMap>(&self.name)))),
        }
    }

    /// A fence that cannot be read lets nobody through.
    fn read(&self, found: &ConfigMap, key: &str) -> Result<Token, FenceError> {
        let Some(text) = found.annotations().get(key) else {
            return Ok(Token(0));
        };
        text.parse().map_err(|error| FenceError::Damaged {
            path: PathBuf::from(format!("configmap/{}", self.name)),
            source: io::Error::new(io::ErrorKind::InvalidData, error),
        })
    }

    fn contended(&self) -> RuntimeError {
        RuntimeError::Engine {
            what: format!("cannot use the fence {}", self.name),
            retryable: true,
            source: format!("it was changed by others {TRIES} times in a row").into(),
        }
    }
}
