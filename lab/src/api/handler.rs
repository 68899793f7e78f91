//! One request: what it is about, what goes wrong with it on purpose, and what the store
//! makes of it.

use std::collections::HashMap;
use std::future::pending;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, Query, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::access::Access;
use super::admission::User;
use super::discovery;
use super::error::ApiError;
use super::fault::{Effect, Fault, Faults, Request};
use super::log::{LoggedRequest, RequestLog};
use super::object::metadata;
use super::patch::PatchType;
use super::resource::Resource;
use super::selector::Selector;
use super::store::{Admission, Store};
use super::table::Format;
use super::target::{Subresource, Target};
use super::watch;

/// What every request works on.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    pub(super) store: Arc<Store>,
    pub(super) faults: Arc<Faults>,
    pub(super) access: Arc<Access>,
    pub(super) requests: Arc<RequestLog>,
}

type Parameters = HashMap<String, String>;

/// `GET` and `PUT /lab/faults`: the faults in force.
pub(super) async fn get_faults(State(shared): State<Shared>) -> Json<Vec<Fault>> {
    Json(shared.faults.list())
}

pub(super) async fn put_faults(
    State(shared): State<Shared>,
    Json(faults): Json<Vec<Fault>>,
) -> StatusCode {
    shared.faults.set(faults);
    StatusCode::NO_CONTENT
}

/// `GET /lab/requests`: the newest requests about resources.
pub(super) async fn get_requests(State(shared): State<Shared>) -> Json<Vec<LoggedRequest>> {
    Json(shared.requests.list())
}

/// Every other path.
pub(super) async fn handle(
    State(shared): State<Shared>,
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if method == Method::GET
        && let Some(response) = discovery::answer(uri.path())
    {
        return response;
    }
    let call = match Call::parse(shared, client.ip().to_canonical(), &method, &uri, headers) {
        Ok(call) => call,
        Err(error) => return error.into_response(),
    };
    let name = call.target.name.as_deref();
    call.shared.requests.add(&call.request, name, call.dry_run, &body);
    call.answer(&body).await.unwrap_or_else(IntoResponse::into_response)
}

struct Call {
    shared: Shared,
    target: Target,
    parameters: Parameters,
    headers: HeaderMap,
    request: Request,
    user: User,
    dry_run: bool,
}

impl Call {
    fn parse(
        shared: Shared,
        client: IpAddr,
        method: &Method,
        uri: &Uri,
        headers: HeaderMap,
    ) -> Result<Self, ApiError> {
        let user = shared.access.user(&headers)?;
        let target = Target::parse(uri.path()).ok_or_else(ApiError::unknown_path)?;
        let Query(parameters) = Query::<Parameters>::try_from_uri(uri)
            .map_err(|error| ApiError::bad_request(error.body_text()))?;
        let dry_run = match parameters.get("dryRun").map(String::as_str) {
            None | Some("") => false,
            Some("All") => true,
            Some(_) => return Err(ApiError::bad_request("dryRun: supported values: \"All\"")),
        };
        let verb = match (method, &target.name) {
            (&Method::GET, None) if is_true(&parameters, "watch") => "watch",
            (&Method::GET, None) => "list",
            (&Method::GET, Some(_)) => "get",
            (&Method::POST, None) => "create",
            (&Method::PUT, Some(_)) => "update",
            (&Method::PATCH, Some(_)) => "patch",
            (&Method::DELETE, Some(_)) if target.subresource == Subresource::Main => "delete",
            _ => return Err(ApiError::method_not_allowed()),
        };
        let request = Request { verb, resource: target.resource.plural, client: Some(client) };
        Ok(Self { shared, target, parameters, headers, request, user, dry_run })
    }

    async fn answer(self, body: &[u8]) -> Result<Response, ApiError> {
        let fault = self
            .shared
            .faults
            .take(&self.request, |effect| matches!(effect, Effect::Status { .. } | Effect::Hang));
        match fault {
            Some(Effect::Status { code, retry_after }) => {
                return Err(ApiError::injected(code, retry_after));
            }
            Some(_) => pending::<()>().await,
            None => {}
        }
        match self.request.verb {
            "watch" => self.watch(),
            "list" => self.list(),
            "create" => self.create(body),
            verb => self.on_object(verb, body),
        }
    }

    fn on_object(&self, verb: &str, body: &[u8]) -> Result<Response, ApiError> {
        let Target { resource, namespace, name, subresource } = &self.target;
        let name = name.as_deref().unwrap_or_default();
        let key = (*resource, namespace.as_str(), name);
        let store = &self.shared.store;
        let object = match verb {
            "get" => store.get(resource, namespace, name)?,
            "update" => {
                let new = self.json_body(body)?;
                if metadata(&new, "name") != name {
                    let message = "the name of the object does not match the name on the URL";
                    return Err(ApiError::bad_request(message));
                }
                store.update(key, *subresource, &self.admission(), |_| Ok(new))?
            }
            "patch" => {
                let kind = PatchType::from_content_type(self.content_type())?;
                let patch = parse_json(body)?;
                store.update(key, *subresource, &self.admission(), |old| kind.apply(old, &patch))?
            }
            _ => {
                let options = if body.is_empty() { Value::Null } else { self.json_body(body)? };
                if self.dry_run {
                    return Err(ApiError::bad_request("the lab deletes nothing in a dry run"));
                }
                let deleted = store.delete(key, &options["preconditions"])?;
                return Ok(Json(deletion(resource, &deleted)).into_response());
            }
        };
        Ok(Json(self.format().object(resource, &object)).into_response())
    }

    fn admission(&self) -> Admission<'_> {
        let about = (self.target.resource, self.target.subresource);
        Admission {
            judge: Box::new(move |old, new| self.shared.access.admit(&self.user, about, old, new)),
            dry_run: self.dry_run,
        }
    }

    fn create(&self, body: &[u8]) -> Result<Response, ApiError> {
        let Target { resource, namespace, .. } = &self.target;
        if resource.namespaced && namespace.is_empty() {
            return Err(ApiError::method_not_allowed());
        }
        let store = &self.shared.store;
        let object = store.create(resource, namespace, &self.admission(), self.json_body(body)?)?;
        let object = self.format().object(resource, &object);
        Ok((StatusCode::CREATED, Json(object)).into_response())
    }

    fn list(&self) -> Result<Response, ApiError> {
        let Target { resource, namespace, .. } = &self.target;
        let selector = self.selector()?;
        let listing = self.shared.store.list(resource, namespace);
        let fault = self.shared.faults.take(&self.request, |effect| {
            matches!(effect, Effect::EmptyList | Effect::Omit { .. })
        });
        let hidden = |object: &Value| match &fault {
            Some(Effect::Omit { name }) => metadata(object, "name") == name,
            fault => fault.is_some(),
        };
        let objects: Vec<&Value> = listing
            .objects
            .iter()
            .map(AsRef::as_ref)
            .filter(|object| !hidden(object) && selector.matches(object))
            .collect();
        Ok(Json(self.format().list(resource, listing.revision, &objects)).into_response())
    }

    fn watch(self) -> Result<Response, ApiError> {
        let number = |key: &str| {
            let text = self.parameters.get(key).filter(|text| !text.is_empty());
            text.map(|text| {
                let message = format!("{key}: Invalid value: \"{text}\"");
                text.parse::<u64>().map_err(|_| ApiError::bad_request(message))
            })
            .transpose()
        };
        let parameters = watch::Parameters {
            resource: self.target.resource,
            namespace: self.target.namespace.clone(),
            selector: self.selector()?,
            from: number("resourceVersion")?,
            send_initial_events: is_true(&self.parameters, "sendInitialEvents"),
            bookmarks: is_true(&self.parameters, "allowWatchBookmarks"),
            timeout: number("timeoutSeconds")?.map(Duration::from_secs),
            format: self.format(),
            request: self.request,
        };
        let Shared { store, faults, .. } = self.shared;
        let content_type = [(header::CONTENT_TYPE, "application/json")];
        match watch::start(&store, faults, parameters) {
            Ok(body) => Ok((content_type, body).into_response()),
            // kube-apiserver says this inside the stream.
            Err(error) => {
                let event = json!({ "type": "ERROR", "object": error.status() });
                Ok((content_type, format!("{event}\n")).into_response())
            }
        }
    }

    fn selector(&self) -> Result<Selector, ApiError> {
        let parameter = |key: &str| self.parameters.get(key).map(String::as_str);
        Selector::parse(parameter("labelSelector"), parameter("fieldSelector"))
    }

    fn format(&self) -> Format {
        let include_object = self.parameters.get("includeObject").map(String::as_str);
        Format::negotiate(self.header(header::ACCEPT), include_object)
    }

    fn json_body(&self, body: &[u8]) -> Result<Value, ApiError> {
        match self.content_type().split(';').next().unwrap_or_default().trim() {
            "" | "application/json" => parse_json(body),
            other => Err(ApiError::unsupported_media(other, "application/json")),
        }
    }

    fn content_type(&self) -> &str {
        self.header(header::CONTENT_TYPE)
    }

    fn header(&self, name: header::HeaderName) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

fn deletion(resource: &Resource, deleted: &Value) -> Value {
    json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": {
            "name": metadata(deleted, "name"),
            "kind": resource.plural,
            "uid": metadata(deleted, "uid"),
        },
    })
}

fn parse_json(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(format!("the body is not JSON: {error}")))
}

fn is_true(parameters: &Parameters, key: &str) -> bool {
    matches!(parameters.get(key).map(String::as_str), Some("true" | "1"))
}
