//! Templates: what sessions run. A session keeps the manifest that it was created with.

use regent_types::{Revision, TemplateName};

use crate::limits::MAX_MANIFEST;
use crate::outcome::{Applied, Noun, Outcome, Rejection};
use crate::record::Template;
use crate::txn::Txn;

/// What `PutTemplate` carries.
#[derive(Debug)]
pub(crate) struct Put {
    pub(crate) name: TemplateName,
    /// JSON text, checked and normalised by the node that took it.
    pub(crate) manifest: String,
    pub(crate) cpu: u64,
    pub(crate) memory: u64,
    pub(crate) create_only: bool,
    pub(crate) if_match: Option<Revision>,
}

/// Makes or changes a template. One that came with Regent is the user's own once it is changed.
pub(crate) fn put(txn: &mut Txn<'_>, op: Put) -> Applied {
    txn.actor.need_operator("change templates")?;
    let old = txn.state().template(&op.name).cloned();
    match &old {
        Some(_) if op.create_only => {
            return Err(Rejection::AlreadyExists {
                noun: Noun::Template,
                name: op.name.to_string(),
            });
        }
        None if op.if_match.is_some() => return Err(not_found(&op.name)),
        _ => {}
    }
    if let (Some(old), Some(expected)) = (&old, op.if_match)
        && old.changed != expected
    {
        return Err(Rejection::Changed {
            expected: expected.0,
            current: old.changed.0,
        });
    }
    if op.manifest.len() > MAX_MANIFEST {
        let message = format!(
            "the manifest has {} bytes; {MAX_MANIFEST} are allowed",
            op.manifest.len()
        );
        return Err(Rejection::Invalid {
            field: "manifest".to_owned(),
            message,
        });
    }
    let now = txn.now();
    let template = txn.put_template(Template {
        name: op.name,
        manifest: op.manifest.into(),
        cpu: op.cpu,
        memory: op.memory,
        built_in: false,
        created_at: old.as_ref().map_or(now, |old| old.created_at),
        updated_at: now,
        changed: Revision(0),
    });
    Ok(Outcome::Template {
        template,
        created: old.is_none(),
    })
}

/// Removes a template; sessions of it go on.
pub(crate) fn delete(txn: &mut Txn<'_>, name: &TemplateName) -> Applied {
    txn.actor.need_operator("delete templates")?;
    if txn.state().template(name).is_none() {
        return Err(not_found(name));
    }
    txn.remove_template(name);
    Ok(Outcome::Done)
}

/// Writes the templates that come with Regent; part of the very first operation.
pub(crate) fn put_built_in(txn: &mut Txn<'_>) {
    let now = txn.now();
    for built_in in crate::builtin::TEMPLATES {
        txn.put_template(Template {
            name: built_in.name(),
            manifest: built_in.manifest.into(),
            cpu: built_in.cpu,
            memory: built_in.memory,
            built_in: true,
            created_at: now,
            updated_at: now,
            changed: Revision(0),
        });
    }
}

fn not_found(name: &TemplateName) -> Rejection {
    Rejection::NotFound {
        noun: Noun::Template,
        name: name.to_string(),
    }
}
