//! All routes, and what is answered where there is none.

use axum::Router;
use axum::handler::Handler as _;
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodRouter, delete, get, patch, post, put};
use regent_types::Code;

use super::observe::{Counted, observe};
use super::problem::Failure;
use super::{
    agents, auth, backup, cluster, commands, events, health, leases, members, metrics, openapi, sessions,
    templates, tokens, users,
};
use crate::service::Service;

/// The routes of a node.
pub(crate) fn router(service: Service) -> Router {
    metrics::install();
    let observed = |method, route| from_fn_with_state(Counted::new(&service, method, route), observe);
    let mut router = Router::new();
    for (method, path, handler) in routes() {
        router = router.route(path, handler.layer(observed(method, path)));
    }
    router
        .fallback_service(no_route.layer(observed("any", "unmatched")).with_state(()))
        .method_not_allowed_fallback(no_method.layer(observed("any", "unmatched")))
        .with_state(service)
}

/// Method, path and handler of every route. The document is compared with this table in a test.
fn routes() -> Vec<(&'static str, &'static str, MethodRouter<Service>)> {
    vec![
        ("POST", "/api/v1/auth/login", post(auth::login)),
        ("POST", "/api/v1/auth/logout", post(auth::logout)),
        ("GET", "/api/v1/sessions", get(sessions::list)),
        ("POST", "/api/v1/sessions", post(sessions::create)),
        ("GET", "/api/v1/sessions/{name}", get(sessions::get)),
        ("PATCH", "/api/v1/sessions/{name}", patch(sessions::patch)),
        ("DELETE", "/api/v1/sessions/{name}", delete(sessions::delete)),
        (
            "PUT",
            "/api/v1/sessions/{name}/hibernate",
            put(sessions::hibernate),
        ),
        ("PUT", "/api/v1/sessions/{name}/wake", put(sessions::wake)),
        (
            "POST",
            "/api/v1/sessions/{name}/heartbeat",
            post(sessions::heartbeat),
        ),
        ("GET", "/api/v1/agents", get(agents::list)),
        ("POST", "/api/v1/agents/register", post(agents::register)),
        ("GET", "/api/v1/agents/connect", get(crate::gateway::connect)),
        ("GET", "/api/v1/agents/{id}", get(agents::get)),
        ("DELETE", "/api/v1/agents/{id}", delete(agents::delete)),
        ("POST", "/api/v1/agents/{id}/cordon", post(agents::cordon)),
        ("POST", "/api/v1/agents/{id}/uncordon", post(agents::uncordon)),
        ("POST", "/api/v1/agents/{id}/drain", post(agents::drain)),
        ("POST", "/api/v1/agents/{id}/token", post(agents::token)),
        ("POST", "/api/v1/agents/{id}/commands", post(agents::command)),
        ("GET", "/api/v1/commands", get(commands::list)),
        ("GET", "/api/v1/commands/{id}", get(commands::get)),
        ("POST", "/api/v1/commands/{id}/cancel", post(commands::cancel)),
        ("POST", "/api/v1/commands/{id}/retry", post(commands::retry)),
        ("GET", "/api/v1/leases", get(leases::list)),
        ("GET", "/api/v1/leases/{name}", get(leases::get)),
        ("DELETE", "/api/v1/leases/{name}", delete(leases::force_release)),
        ("GET", "/api/v1/leases/{name}/watch", get(leases::watch)),
        ("POST", "/api/v1/leases/{name}/acquire", post(leases::acquire)),
        ("POST", "/api/v1/leases/{name}/renew", post(leases::renew)),
        ("POST", "/api/v1/leases/{name}/release", post(leases::release)),
        ("POST", "/api/v1/leases/{name}/verify", post(leases::verify)),
        ("GET", "/api/v1/templates", get(templates::list)),
        ("POST", "/api/v1/templates", post(templates::create)),
        ("GET", "/api/v1/templates/{name}", get(templates::get)),
        ("PUT", "/api/v1/templates/{name}", put(templates::put)),
        ("DELETE", "/api/v1/templates/{name}", delete(templates::delete)),
        ("GET", "/api/v1/users", get(users::list)),
        ("POST", "/api/v1/users", post(users::create)),
        ("DELETE", "/api/v1/users/{name}", delete(users::delete)),
        ("PUT", "/api/v1/users/{name}/password", put(users::set_password)),
        ("PUT", "/api/v1/users/{name}/quota", put(users::set_quota)),
        ("GET", "/api/v1/tokens", get(tokens::list)),
        ("POST", "/api/v1/tokens", post(tokens::create)),
        ("DELETE", "/api/v1/tokens/{id}", delete(tokens::delete)),
        ("GET", "/api/v1/events", get(events::watch)),
        ("GET", "/api/v1/cluster", get(cluster::get)),
        ("POST", "/api/v1/cluster/transfer", post(cluster::transfer)),
        ("GET", "/api/v1/cluster/backup", get(backup::get)),
        ("POST", "/api/v1/cluster/members", post(members::join)),
        ("DELETE", "/api/v1/cluster/members/{id}", delete(members::remove)),
        (
            "POST",
            "/api/v1/cluster/members/{id}/promote",
            post(members::promote),
        ),
        ("GET", "/livez", get(health::livez)),
        ("GET", "/readyz", get(health::readyz)),
        ("GET", "/health", get(health::health)),
        ("GET", "/version", get(health::version)),
        ("GET", "/metrics", get(metrics::get)),
        ("GET", "/openapi.json", get(openapi::get)),
    ]
}

async fn no_route() -> Failure {
    Failure::new(
        Code::RouteNotFound,
        "there is no such route; /openapi.json lists all",
    )
}

async fn no_method() -> Failure {
    Failure::new(
        Code::MethodNotAllowed,
        "the route does not take this method; `Allow` says which it takes",
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_document_has_every_route_and_nothing_else() {
        let document = serde_json::to_value(openapi::document()).unwrap();
        let documented: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, item)| {
                item.as_object()
                    .unwrap()
                    .keys()
                    .map(|method| (method.clone(), path.clone()))
            })
            .collect();
        let served: BTreeSet<(String, String)> = routes()
            .iter()
            .map(|(method, path, _)| (method.to_lowercase(), (*path).to_owned()))
            .collect();
        assert_eq!(documented, served);
    }

    #[test]
    fn every_reference_in_the_document_leads_somewhere() {
        let text = openapi::document().to_json().unwrap();
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        for reference in text
            .split("\"$ref\":\"")
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap())
        {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
        }
    }
}
