//! The Kubernetes runtime: a session is a Deployment of one pod, with a Service for its ports and a
//! `PersistentVolumeClaim` for its home.
//!
//! - [`options`](KubernetesOptions) says where and how; `api` is the server, its answers and its errors.
//! - Pure: `names` (what things are called and labelled), `objects`, `template` and `security` (what a start asks
//!   for), `record` (what a Deployment says of its session), `pods` (what a pod says of its container), `found` (both
//!   joined), `mirror` (what changes mean, and what of it was told).
//! - The actions: `start`, `stop`, `sleep`; `settle` waits for a pod, `change` is how anything that is there is
//!   changed, `fence` who may.
//! - `watch` feeds the mirror and tells its news.
//!
//! All that there is to know is in the objects themselves: the [`KubernetesRuntime`] holds nothing that a new
//! one would miss, so any replica finds, adopts and ends what another started. A Deployment's `regent.dev/phase`
//! says how far its session is and sets its number of pods; both change in one patch.
//!
//! # Fencing
//!
//! The highest token is kept in a `ConfigMap`, raised before the first action under it; each action reads it
//! first and refuses an older one. [`take_over`](regent_agent::Runtime::take_over) then writes the new token to
//! every object. An object that is there is changed and deleted only under the resource version at which it was
//! read, and only if the token on it was not newer: a call of a former leader that passed the `ConfigMap` before it
//! was raised is refused by the server, because the object is another version since.
//!
//! What is left to such a late call: between its look at the `ConfigMap` and its next request it may create one
//! Deployment under a name that is free, with its Service and claim, which the new leader finds by their labels
//! in the next `list` and adopts or removes; and it may delete a pod that has lost its Deployment, or hurry one that
//! is being deleted. It can change nothing that runs under the new leader.
//!
//! # What ends a session
//!
//! Its container ending by itself, whatever the code. Deployments start such a container again at once, so
//! the runtime scales to zero when it sees the end; the program may have begun a second time by then. Pods that
//! are deleted, evicted or lost with their node are no end: Kubernetes replaces them, and what is wrong in the
//! meantime is told. A node that reboots and goes on with the same pod is an end: its containers did end, and nothing
//! tells that from an end of their own.

mod api;
mod change;
mod engine;
mod fence;
mod found;
#[doc(hidden)]
pub mod fuzzing;
mod mirror;
mod names;
mod objects;
mod options;
mod pods;
mod record;
mod runtime;
mod security;
mod settle;
mod sleep;
mod start;
mod stop;
mod template;
mod watch;

pub use options::KubernetesOptions;
pub use runtime::KubernetesRuntime;
