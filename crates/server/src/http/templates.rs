//! `/templates`: what sessions run. A body is a whole manifest, as StreamSpace has it; it is checked and
//! written anew before it is proposed, so that what is kept can always be read.

use std::collections::BTreeSet;

use axum::http::StatusCode;
use axum::response::Response;
use regent_state::record::Role;
use regent_state::{Noun, Operation, Outcome};
use regent_types::template::{self as api, Manifest};
use regent_types::{Revision, TemplateName};
use serde::Deserialize;
use utoipa::IntoParams;

use super::caller::{Reading, Writing};
use super::openapi::{ReadProblems, WriteProblems};
use super::paging::Page;
use super::problem::{Failure, Result};
use super::query::{Consistency, Name, NoQuery, Query, Read};
use super::{limits, reply, view};

const API_VERSION: &str = "stream.space/v1alpha1";
const KIND: &str = "Template";
/// Words of a command, arguments, variables or ports: far more than any template has.
const MAX_ITEMS: usize = 128;
/// Bytes of one word, of one variable's value, of an image's name.
const MAX_ITEM_BYTES: usize = 8 << 10;
/// Bytes of a whole manifest: every session of it carries it along.
const MAX_MANIFEST_BYTES: usize = 64 << 10;
/// CPU of a session when neither it nor its template says: half a core.
const DEFAULT_CPU: u64 = 500;
/// Memory of a session when neither it nor its template says: 512 MiB.
const DEFAULT_MEMORY: u64 = 512 << 20;

/// Query of `GET /templates`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListTemplates {
    /// Records on a page: 1 to 1000, 100 when absent.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
    /// `nextCursor` of the page before.
    cursor: Option<String>,
    /// `linearizable` (default) or `stale`.
    #[serde(default)]
    #[param(inline)]
    consistency: Consistency,
    /// See at least this revision.
    #[param(value_type = Option<u64>)]
    min_index: Option<Revision>,
}

/// Lists templates, by name.
#[utoipa::path(get, path = "/api/v1/templates", tag = "templates", params(ListTemplates),
    responses((status = 200, description = "One page", body = api::TemplateList), ReadProblems))]
pub(super) async fn list(reading: Reading, Query(query): Query<ListTemplates>) -> Result<Response> {
    let page = Page::new("templates", query.limit, query.cursor.as_deref())?;
    let snapshot = reading
        .view(Read {
            consistency: query.consistency,
            min_index: query.min_index,
        })
        .await?;
    let records = snapshot.state().templates().values();
    let (records, total, next_cursor) = page.take(records, |template| template.name.to_string());
    let templates = records
        .into_iter()
        .filter_map(|template| view::template(template))
        .collect();
    Ok(reply::json(
        StatusCode::OK,
        snapshot.revision(),
        &api::TemplateList {
            templates,
            total,
            next_cursor,
        },
    ))
}

/// Shows one template.
#[utoipa::path(get, path = "/api/v1/templates/{name}", tag = "templates",
    params(("name" = String, Path, description = "The template"), Read),
    responses((status = 200, description = "The template", body = api::Template), ReadProblems))]
pub(super) async fn get(
    reading: Reading,
    Name(name): Name<TemplateName>,
    Query(read): Query<Read>,
) -> Result<Response> {
    let snapshot = reading.view(read).await?;
    let record = snapshot
        .state()
        .template(&name)
        .ok_or_else(|| Failure::not_found(Noun::Template, &name))?;
    let body =
        view::template(record).ok_or_else(|| Failure::internal("the manifest kept is not readable"))?;
    Ok(reply::record(
        StatusCode::OK,
        snapshot.revision(),
        record.changed,
        &body,
    ))
}

/// Makes a template from a whole manifest; 409 when there is one of that name.
#[utoipa::path(post, path = "/api/v1/templates", tag = "templates", request_body = Manifest,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition safe for 24 h")),
    responses((status = 201, description = "The template", body = api::Template), WriteProblems))]
pub(super) async fn create(Query(NoQuery {}): Query<NoQuery>, writing: Writing) -> Result<Response> {
    let manifest: Manifest = writing.json()?;
    put_manifest(&writing, &manifest, true, None).await
}

/// Makes or changes a template.
#[utoipa::path(put, path = "/api/v1/templates/{name}", tag = "templates", request_body = Manifest,
    params(("name" = String, Path, description = "The template, the same as in the manifest"),
        ("If-Match" = Option<String>, Header, description = "An `ETag`: refuse with 412 when it has changed since")),
    responses((status = 200, description = "Changed", body = api::Template),
        (status = 201, description = "A new one", body = api::Template), WriteProblems))]
pub(super) async fn put(
    Name(name): Name<TemplateName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let manifest: Manifest = writing.json()?;
    if manifest.metadata.name != name {
        return Err(Failure::field(
            "metadata.name",
            format!("must be {name}, as in the path"),
        ));
    }
    let if_match = writing.if_match()?;
    put_manifest(&writing, &manifest, false, if_match).await
}

async fn put_manifest(
    writing: &Writing,
    manifest: &Manifest,
    create_only: bool,
    if_match: Option<Revision>,
) -> Result<Response> {
    writing.caller.require(Role::Operator, "changing templates")?;
    let text = text_of(manifest)?;
    let (cpu, memory) = limits::resources("spec.defaultResources", &manifest.spec.default_resources)?;
    let operation = Operation::PutTemplate {
        name: manifest.metadata.name.clone(),
        manifest: text,
        cpu: cpu.unwrap_or(DEFAULT_CPU),
        memory: memory.unwrap_or(DEFAULT_MEMORY),
        create_only,
        if_match,
    };
    let done = writing.propose(operation).await?;
    let Outcome::Template { template, created } = &done.outcome else {
        return Err(done.unexpected());
    };
    let status = if *created {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    let body = view::template(template).ok_or_else(|| done.unexpected())?;
    Ok(reply::record(status, done.revision, template.changed, &body))
}

/// Removes a template. Sessions keep what they were started with.
#[utoipa::path(delete, path = "/api/v1/templates/{name}", tag = "templates",
    params(("name" = String, Path, description = "The template")),
    responses((status = 204, description = "It is gone"), WriteProblems))]
pub(super) async fn delete(
    Name(name): Name<TemplateName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let done = writing.propose(Operation::DeleteTemplate { name }).await?;
    Ok(reply::nothing(done.revision))
}

/// The text of a manifest as it is kept, once it is checked.
pub(super) fn text_of(manifest: &Manifest) -> Result<String> {
    check(manifest)?;
    let text = serde_json::to_string(manifest)
        .map_err(|error| Failure::internal(format!("the manifest cannot be written: {error}")))?;
    if text.len() > MAX_MANIFEST_BYTES {
        return Err(Failure::field(
            "body",
            format!("a manifest has at most {MAX_MANIFEST_BYTES} bytes"),
        ));
    }
    Ok(text)
}

/// What a runtime could not start, or would have to guess, is refused here with the field's name.
fn check(manifest: &Manifest) -> Result<()> {
    let spec = &manifest.spec;
    if manifest.api_version != API_VERSION {
        return Err(Failure::field("apiVersion", format!("must be {API_VERSION}")));
    }
    if manifest.kind != KIND {
        return Err(Failure::field("kind", format!("must be {KIND}")));
    }
    limits::labels("metadata.labels", &manifest.metadata.labels)?;
    if spec.base_image.is_empty() && spec.command.is_empty() {
        return Err(Failure::field(
            "spec",
            "needs `baseImage`, or `command` for a plain process",
        ));
    }
    if spec
        .base_image
        .chars()
        .any(|c| c.is_control() || c.is_whitespace())
    {
        return Err(Failure::field(
            "spec.baseImage",
            "cannot have spaces or control characters",
        ));
    }
    item("spec.baseImage", &spec.base_image)?;
    items("spec.command", spec.command.len())?;
    items("spec.args", spec.args.len())?;
    items("spec.env", spec.env.len())?;
    items("spec.ports", spec.ports.len())?;
    items("spec.volumeMounts", spec.volume_mounts.len())?;
    if spec.command.first().is_some_and(String::is_empty) {
        return Err(Failure::field("spec.command[0]", "cannot be empty"));
    }
    for (n, word) in spec.command.iter().enumerate() {
        item(&format!("spec.command[{n}]"), word)?;
    }
    for (n, word) in spec.args.iter().enumerate() {
        item(&format!("spec.args[{n}]"), word)?;
    }
    for (n, env) in spec.env.iter().enumerate() {
        let field = format!("spec.env[{n}]");
        if env.name.is_empty() || env.name.contains('=') {
            return Err(Failure::field(
                format!("{field}.name"),
                "cannot be empty and cannot have `=`",
            ));
        }
        item(&format!("{field}.name"), &env.name)?;
        item(&format!("{field}.value"), &env.value)?;
    }
    let mut ports = BTreeSet::new();
    for (n, port) in spec.ports.iter().enumerate() {
        let field = format!("spec.ports[{n}].containerPort");
        if port.container_port == 0 {
            return Err(Failure::field(field, "must be from 1 to 65535"));
        }
        if !ports.insert((port.container_port, port.protocol.as_str())) {
            return Err(Failure::field(field, "is there twice"));
        }
    }
    for (n, mount) in spec.volume_mounts.iter().enumerate() {
        if !mount.mount_path.starts_with('/') {
            return Err(Failure::field(
                format!("spec.volumeMounts[{n}].mountPath"),
                "must begin with `/`",
            ));
        }
        item(&format!("spec.volumeMounts[{n}].mountPath"), &mount.mount_path)?;
    }
    Ok(())
}

fn items(field: &str, count: usize) -> Result<()> {
    if count > MAX_ITEMS {
        return Err(Failure::field(field, format!("at most {MAX_ITEMS}")));
    }
    Ok(())
}

/// A word that reaches `execve` or a runtime's API: no NUL can pass there.
fn item(field: &str, text: &str) -> Result<()> {
    if text.len() > MAX_ITEM_BYTES || text.contains('\0') {
        return Err(Failure::field(
            field,
            format!("at most {MAX_ITEM_BYTES} bytes and no NUL"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(manifest: &str) -> String {
        let manifest: Manifest = serde_json::from_str(manifest).unwrap();
        format!("{:?}", check(&manifest).unwrap_err())
    }

    #[test]
    fn streamspaces_own_manifest_is_taken() {
        let manifest = r#"{"apiVersion":"stream.space/v1alpha1","kind":"Template",
            "metadata":{"name":"firefox-browser","namespace":"streamspace"},
            "spec":{"baseImage":"lscr.io/linuxserver/firefox:latest","ports":[{"name":"vnc","containerPort":3000}],
            "env":[{"name":"PUID","value":"1000"}],"volumeMounts":[{"name":"user-home","mountPath":"/config"}],
            "defaultResources":{"memory":"2Gi","cpu":"1000m"},"vnc":{"enabled":true,"port":3000,"protocol":"http"}}}"#;
        check(&serde_json::from_str(manifest).unwrap()).unwrap();
    }

    #[test]
    fn what_no_runtime_could_start_is_refused_by_field() {
        let spec = |spec: &str| format!(r#"{{"metadata":{{"name":"t"}},"spec":{spec}}}"#);
        assert!(refused(&spec("{}")).contains("baseImage"));
        assert!(refused(&spec(r#"{"command":[""]}"#)).contains("spec.command[0]"));
        assert!(refused(&spec(r#"{"command":["a"],"args":["\u0000"]}"#)).contains("spec.args[0]"));
        assert!(
            refused(&spec(r#"{"command":["a"],"env":[{"name":"A=B","value":""}]}"#))
                .contains("spec.env[0].name")
        );
        let twice = r#"{"command":["a"],"ports":[{"containerPort":1},{"containerPort":1}]}"#;
        assert!(refused(&spec(twice)).contains("spec.ports[1]"));
        assert!(
            refused(r#"{"kind":"Pod","metadata":{"name":"t"},"spec":{"command":["a"]}}"#).contains("kind")
        );
    }
}
