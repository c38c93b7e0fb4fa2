//! Routes that are registered and listed in one step, so that the description of the API (`docs/openapi.json`) cannot
//! leave one out. `clippy.toml` forbids the way around it.

use axum::Router;
use axum::handler::Handler;
use axum::http::Method;
use axum::routing::{MethodRouter, get, post};

/// Routes whose handlers take the state `S`.
pub struct Routes<S = ()> {
    router: Router<S>,
    list: Vec<(Method, &'static str)>,
}

impl<S: Clone + Send + Sync + 'static> Default for Routes<S> {
    fn default() -> Self {
        Self {
            router: Router::new(),
            list: Vec::new(),
        }
    }
}

impl<S: Clone + Send + Sync + 'static> Routes<S> {
    /// A handler of `GET`, and so of `HEAD`.
    #[must_use]
    pub fn get<H, T>(self, path: &'static str, handler: H) -> Self
    where
        H: Handler<T, S>,
        T: 'static,
    {
        self.add(Method::GET, path, get(handler))
    }

    /// A handler of `POST`.
    #[must_use]
    pub fn post<H, T>(self, path: &'static str, handler: H) -> Self
    where
        H: Handler<T, S>,
        T: 'static,
    {
        self.add(Method::POST, path, post(handler))
    }

    // The one place that registers.
    #[allow(clippy::disallowed_methods)]
    fn add(self, method: Method, path: &'static str, handler: MethodRouter<S>) -> Self {
        let Self { router, mut list } = self;
        list.push((method, path));
        Self {
            router: router.route(path, handler),
            list,
        }
    }

    /// Methods and path patterns, in the order in which they were registered.
    #[must_use]
    pub fn list(&self) -> &[(Method, &'static str)] {
        &self.list
    }

    /// What answers them.
    pub fn into_router(self) -> Router<S> {
        self.router
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_registered_is_listed() {
        async fn nothing() {}
        let routes = Routes::<()>::default()
            .get("/a", nothing)
            .post("/a", nothing)
            .post("/b/{c}", nothing);
        let expected = [
            (Method::GET, "/a"),
            (Method::POST, "/a"),
            (Method::POST, "/b/{c}"),
        ];
        assert_eq!(routes.list(), expected);
    }
}
