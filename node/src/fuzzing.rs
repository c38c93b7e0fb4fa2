//! For each parser of the node a property that holds whatever the bytes are. A function panics where it does not hold,
//! and otherwise says whether the bytes were accepted. Each stands beside its parser; the crate `hsm-fuzz` feeds them.

pub use crate::admin::fuzzing::{acl_document, revocation, revoked_file};
pub use crate::config::fuzzing::config;
pub use crate::consensus::fuzzing::{join_token, wire, wire_seeds};
pub use crate::http::fuzzing::{
    ciphertext, client_cert, go_base64, proxy_header, request_id, request_json, traceparent,
};
pub use crate::identity::fuzzing::{certificate, distinguished_name};
pub use crate::secrets::fuzzing::secret_file;
pub use crate::tls::fuzzing::crl;
