//! How anything that is there is changed or deleted.
//!
//! Invariant: an object is touched only at the version that was read, and only if its token is not newer than
//! the caller's. The server refuses anything else, so neither a slow request of a former leader nor two that
//! meet can undo what came in between; the loser reads again and decides again.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, Patch, Preconditions};
use kube::{Resource, ResourceExt};
use regent_agent::fence::FenceError;
use regent_agent::runtime::RuntimeError;
use regent_types::Token;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::api::{self, answer, named};
use crate::names::annotation;
use crate::objects::token_of;

/// How often a change is tried that others come before. The Deployment controller writes a few times while a pod
/// comes up; more than this in a row is a fight with somebody.
pub(crate) const TRIES: usize = 16;

/// What an object of the API can do; all of ours can.
pub(crate) trait Object:
    Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned
{
}
impl<K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned> Object for K {}

/// Changes an object under a token: `decide` is told what is there and gives the patch, or nothing when nothing is
/// to be done. Gives what is there after that, or nothing when it is gone.
pub(crate) async fn change<K: Object>(
    api: &Api<K>,
    name: &str,
    token: Token,
    mut decide: impl FnMut(&K) -> Result<Option<Value>, RuntimeError>,
) -> Result<Option<K>, RuntimeError> {
    for _ in 0..TRIES {
        let Some(object) = api::get(api, name).await? else {
            return Ok(None);
        };
        admits(object.meta(), token)?;
        let Some(patch) = decide(&object)? else {
            return Ok(Some(object));
        };
        match answer(write(api, &object, token, patch)).await {
            Ok(changed) => return Ok(Some(changed)),
            Err(error) if error.is_conflict() => {}
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.at(format!("cannot change {}", named::<K>(name)))),
        }
    }
    Err(contended::<K>(name))
}

/// Patches an object at the version that was read, and puts the token on it.
async fn write<K: Object>(api: &Api<K>, read: &K, token: Token, mut patch: Value) -> kube::Result<K> {
    patch["metadata"]["resourceVersion"] = json!(read.meta().resource_version);
    patch["metadata"]["annotations"][annotation::TOKEN] = token.to_string().into();
    api.patch(&read.name_any(), &api::patching(), &Patch::Merge(patch))
        .await
}

/// Deletes an object under a token if `decide` says so of what is there. Gives whether anything is there still,
/// be it on its way out.
pub(crate) async fn delete<K: Object>(
    api: &Api<K>,
    name: &str,
    token: Token,
    how: &DeleteParams,
    mut decide: impl FnMut(&K) -> Result<bool, RuntimeError>,
) -> Result<bool, RuntimeError> {
    for _ in 0..TRIES {
        let Some(object) = api::get(api, name).await? else {
            return Ok(false);
        };
        admits(object.meta(), token)?;
        if !decide(&object)? {
            return Ok(true);
        }
        match answer(api.delete(name, &at_version(&object, how))).await {
            Ok(_) => return Ok(true),
            Err(error) if error.is_conflict() => {}
            Err(error) if error.is_not_found() => return Ok(false),
            Err(error) => return Err(error.at(format!("cannot delete {}", named::<K>(name)))),
        }
    }
    Err(contended::<K>(name))
}

fn at_version<K: Object>(object: &K, how: &DeleteParams) -> DeleteParams {
    how.clone().preconditions(Preconditions {
        resource_version: object.resource_version(),
        uid: object.uid(),
    })
}

/// Whether an object may be changed under this token.
fn admits(meta: &ObjectMeta, token: Token) -> Result<(), RuntimeError> {
    let highest = token_of(meta.annotations.as_ref());
    if token < highest {
        return Err(FenceError::Fenced {
            asked: token,
            highest,
        }
        .into());
    }
    Ok(())
}

fn contended<K: Object>(name: &str) -> RuntimeError {
    RuntimeError::Engine {
        what: format!("cannot change {}", named::<K>(name)),
        retryable: true,
        source: format!("it was changed by others {TRIES} times in a row").into(),
    }
}
