//! Commands: queued, sent, answered.

use regent_types::{AgentId, CommandId, Epoch, Revision};

use crate::operation::CreateCommand;
use crate::outcome::{Applied, Rejection};
use crate::txn::Txn;

/// What every report about a command says.
pub(crate) struct Report<'a> {
    pub(crate) id: &'a CommandId,
    pub(crate) run: Option<u32>,
    pub(crate) agent: &'a AgentId,
    pub(crate) epoch: Epoch,
}

fn not_built() -> Applied {
    Err(Rejection::Identity("not built yet".to_owned()))
}

pub(crate) fn create(_txn: &mut Txn<'_>, _op: &CreateCommand) -> Applied {
    not_built()
}

pub(crate) fn sent(_txn: &mut Txn<'_>, _id: &CommandId, _run: u32, _epoch: Epoch, _attempt: u32) -> Applied {
    not_built()
}

pub(crate) fn acked(_txn: &mut Txn<'_>, _report: &Report<'_>) -> Applied {
    not_built()
}

/// `url` and `metadata` are what the result says of the session, where it is about one.
pub(crate) fn completed(
    _txn: &mut Txn<'_>,
    _report: &Report<'_>,
    _result: &str,
    _url: Option<&str>,
    _metadata: Option<&str>,
) -> Applied {
    not_built()
}

pub(crate) fn failed(_txn: &mut Txn<'_>, _report: &Report<'_>, _error: &str, _retryable: bool) -> Applied {
    not_built()
}

pub(crate) fn overdue(_txn: &mut Txn<'_>, _id: &CommandId, _changed: Revision) -> Applied {
    not_built()
}

pub(crate) fn cancel(_txn: &mut Txn<'_>, _id: &CommandId) -> Applied {
    not_built()
}

pub(crate) fn retry(_txn: &mut Txn<'_>, _id: &CommandId) -> Applied {
    not_built()
}
