//! All routes, and what is answered where there is none.

use axum::Router;
use axum::routing::{MethodRouter, delete, get, patch, post, put};
use regent_types::Code;

use super::observe::observed;
use super::problem::Failure;
use super::{
    agents, auth, cluster, commands, events, health, leases, metrics, openapi, sessions, templates, tokens,
    users,
};
use crate::service::Service;

/// The routes of a node.
pub(crate) fn router(service: Service) -> Router {
    metrics::install();
    let mut router = Router::new();
    for (_, path, handler) in routes() {
        router = router.route(path, handler);
    }
    let router = router.fallback(no_route).method_not_allowed_fallback(no_method);
    observed(router, &service).with_state(service)
}

/// Method, path and handler of every route. The document is compared with this table in a test.
fn routes() -> Vec<(&'static str, &'static str, MethodRouter<Service>)> {
    vec![
        ("post", "/api/v1/auth/login", post(auth::login)),
        ("post", "/api/v1/auth/logout", post(auth::logout)),
        ("get", "/api/v1/sessions", get(sessions::list)),
        ("post", "/api/v1/sessions", post(sessions::create)),
        ("get", "/api/v1/sessions/{name}", get(sessions::get)),
        ("patch", "/api/v1/sessions/{name}", patch(sessions::patch)),
        ("delete", "/api/v1/sessions/{name}", delete(sessions::delete)),
        (
            "put",
            "/api/v1/sessions/{name}/hibernate",
            put(sessions::hibernate),
        ),
        ("put", "/api/v1/sessions/{name}/wake", put(sessions::wake)),
        (
            "post",
            "/api/v1/sessions/{name}/heartbeat",
            post(sessions::heartbeat),
        ),
        ("get", "/api/v1/agents", get(agents::list)),
        ("post", "/api/v1/agents/register", post(agents::register)),
        ("get", "/api/v1/agents/connect", get(crate::gateway::connect)),
        ("get", "/api/v1/agents/{id}", get(agents::get)),
        ("delete", "/api/v1/agents/{id}", delete(agents::delete)),
        ("post", "/api/v1/agents/{id}/cordon", post(agents::cordon)),
        ("post", "/api/v1/agents/{id}/uncordon", post(agents::uncordon)),
        ("post", "/api/v1/agents/{id}/drain", post(agents::drain)),
        ("post", "/api/v1/agents/{id}/token", post(agents::token)),
        ("post", "/api/v1/agents/{id}/commands", post(agents::command)),
        ("get", "/api/v1/commands", get(commands::list)),
        ("get", "/api/v1/commands/{id}", get(commands::get)),
        ("post", "/api/v1/commands/{id}/cancel", post(commands::cancel)),
        ("post", "/api/v1/commands/{id}/retry", post(commands::retry)),
        ("get", "/api/v1/leases", get(leases::list)),
        ("get", "/api/v1/leases/{name}", get(leases::get)),
        ("delete", "/api/v1/leases/{name}", delete(leases::force_release)),
        ("get", "/api/v1/leases/{name}/watch", get(leases::watch)),
        ("post", "/api/v1/leases/{name}/acquire", post(leases::acquire)),
        ("post", "/api/v1/leases/{name}/renew", post(leases::renew)),
        ("post", "/api/v1/leases/{name}/release", post(leases::release)),
        ("post", "/api/v1/leases/{name}/verify", post(leases::verify)),
        ("get", "/api/v1/templates", get(templates::list)),
        ("post", "/api/v1/templates", post(templates::create)),
        ("get", "/api/v1/templates/{name}", get(templates::get)),
        ("put", "/api/v1/templates/{name}", put(templates::put)),
        ("delete", "/api/v1/templates/{name}", delete(templates::delete)),
        ("get", "/api/v1/users", get(users::list)),
        ("post", "/api/v1/users", post(users::create)),
        ("delete", "/api/v1/users/{name}", delete(users::delete)),
        ("put", "/api/v1/users/{name}/password", put(users::set_password)),
        ("put", "/api/v1/users/{name}/quota", put(users::set_quota)),
        ("get", "/api/v1/tokens", get(tokens::list)),
        ("post", "/api/v1/tokens", post(tokens::create)),
        ("delete", "/api/v1/tokens/{id}", delete(tokens::delete)),
        ("get", "/api/v1/events", get(events::watch)),
        ("get", "/api/v1/cluster", get(cluster::get)),
        ("get", "/livez", get(health::livez)),
        ("get", "/readyz", get(health::readyz)),
        ("get", "/health", get(health::health)),
        ("get", "/version", get(health::version)),
        ("get", "/metrics", get(metrics::get)),
        ("get", "/openapi.json", get(openapi::get)),
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
            .map(|(method, path, _)| ((*method).to_owned(), (*path).to_owned()))
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
