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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::{Arc, Mutex};

    use http::{Method, Request, Response};
    use k8s_openapi::api::apps::v1::Deployment;
    use kube::Client;
    use kube::client::Body;
    use tower::service_fn;

    use super::*;

    /// A Deployment that another leader changes, with a token of its own, just before each of the first `rivals` writes.
    #[derive(Default)]
    struct Server {
        version: u64,
        token: u64,
        rivals: u64,
        writes: Vec<Value>,
    }

    impl Server {
        fn object(&self) -> Value {
            json!({
                "apiVersion": "apps/v1", "kind": "Deployment",
                "metadata": {
                    "name": "d", "uid": "u", "resourceVersion": self.version.to_string(),
                    "annotations": { annotation::TOKEN: self.token.to_string() },
                },
            })
        }

        fn serve(&mut self, method: &Method, body: &[u8]) -> (u16, Value) {
            if method == Method::GET {
                return (200, self.object());
            }
            let sent: Value = serde_json::from_slice(body).unwrap();
            let version = match *method {
                Method::PATCH => &sent["metadata"]["resourceVersion"],
                _ => &sent["preconditions"]["resourceVersion"],
            };
            if self.rivals > 0 {
                self.rivals -= 1;
                self.version += 1;
            }
            // As the server does: a write that names no version is taken at any.
            if version
                .as_str()
                .is_some_and(|version| version != self.version.to_string())
            {
                let conflict = json!({
                    "kind": "Status", "status": "Failure", "reason": "Conflict", "code": 409, "message": "changed",
                });
                return (409, conflict);
            }
            self.version += 1;
            self.writes.push(sent);
            (200, self.object())
        }
    }

    fn api(server: &Arc<Mutex<Server>>) -> Api<Deployment> {
        let server = Arc::clone(server);
        let service = service_fn(move |request: Request<Body>| {
            let server = Arc::clone(&server);
            async move {
                let (parts, body) = request.into_parts();
                let body = body.collect_bytes().await.unwrap();
                let (status, answer) = server.lock().unwrap().serve(&parts.method, &body);
                let answer = Response::builder()
                    .status(status)
                    .body(Body::from(answer.to_string().into_bytes()));
                Ok::<_, Infallible>(answer.unwrap())
            }
        });
        Api::namespaced(Client::new(service, "ns"), "ns")
    }

    fn server(token: u64, rivals: u64) -> Arc<Mutex<Server>> {
        Arc::new(Mutex::new(Server {
            token,
            rivals,
            ..Server::default()
        }))
    }

    fn to_zero() -> Value {
        json!({ "spec": { "replicas": 0 } })
    }

    #[tokio::test]
    async fn a_change_is_tried_again_at_the_version_that_is_there_now() {
        let server = server(5, 2);
        change(&api(&server), "d", Token(7), |_| Ok(Some(to_zero())))
            .await
            .unwrap();
        let writes = &server.lock().unwrap().writes;
        assert_eq!(
            *writes,
            [json!({
                "metadata": { "resourceVersion": "2", "annotations": { annotation::TOKEN: "7" } },
                "spec": { "replicas": 0 },
            })]
        );
    }

    /// What a leader does that passed the fence, read the object, and was replaced in that moment.
    #[tokio::test]
    async fn a_late_change_and_a_late_delete_are_refused_also_past_the_fence() {
        let server = server(5, 1);
        let api = api(&server);
        let adopted = |server: &Arc<Mutex<Server>>| server.lock().unwrap().token = 9;
        let late = change(&api, "d", Token(7), |_| {
            adopted(&server);
            Ok(Some(to_zero()))
        });
        let fenced = |error: &RuntimeError| {
            matches!(
                error,
                RuntimeError::Fence(FenceError::Fenced {
                    asked: Token(7),
                    highest: Token(9)
                })
            )
        };
        assert!(fenced(&late.await.unwrap_err()));
        *server.lock().unwrap() = Server {
            token: 5,
            rivals: 1,
            ..Server::default()
        };
        let how = DeleteParams::foreground();
        let late = delete(&api, "d", Token(7), &how, |_: &Deployment| {
            adopted(&server);
            Ok(true)
        });
        assert!(fenced(&late.await.unwrap_err()));
        assert_eq!(server.lock().unwrap().writes, Vec::<Value>::new());
    }

    #[tokio::test]
    async fn a_fight_is_given_up() {
        let server = server(5, u64::MAX);
        let error = change(&api(&server), "d", Token(7), |_| Ok(Some(to_zero())))
            .await
            .unwrap_err();
        assert!(error.is_retryable(), "{error:?}");
    }
}
