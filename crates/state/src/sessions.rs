//! The life of a session.

use regent_types::{CommandId, Revision, SessionName};

use crate::operation::{CreateSession, PatchSession, ReportSession, SessionOperation};
use crate::outcome::{Applied, Rejection};
use crate::txn::Txn;

fn not_built() -> Applied {
    Err(Rejection::Identity("not built yet".to_owned()))
}

pub(crate) fn create(_txn: &mut Txn<'_>, _op: &CreateSession) -> Applied {
    not_built()
}

pub(crate) fn patch(_txn: &mut Txn<'_>, _op: &PatchSession) -> Applied {
    not_built()
}

pub(crate) fn stop(_txn: &mut Txn<'_>, _op: &SessionOperation) -> Applied {
    not_built()
}

pub(crate) fn hibernate(_txn: &mut Txn<'_>, _op: &SessionOperation) -> Applied {
    not_built()
}

pub(crate) fn wake(_txn: &mut Txn<'_>, _op: &SessionOperation) -> Applied {
    not_built()
}

pub(crate) fn place_queued(_txn: &mut Txn<'_>, _waiting: &[(SessionName, CommandId)]) -> Applied {
    not_built()
}

pub(crate) fn overdue(
    _txn: &mut Txn<'_>,
    _name: &SessionName,
    _changed: Revision,
    _command: &CommandId,
) -> Applied {
    not_built()
}

pub(crate) fn report(_txn: &mut Txn<'_>, _op: &ReportSession) -> Applied {
    not_built()
}
