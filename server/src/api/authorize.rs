//! Who may call what: one function, asked by every call of every service.

use fwpush_keys::{DeviceId, NodeId, OperatorId, Role};
use tonic::{Extensions, Status};

use crate::listen::Caller;

/// The caller, if its certificate has `role`. Every service admits exactly one role.
fn admit(caller: Option<&Caller>, role: Role) -> Result<&Caller, Status> {
    let caller = caller.ok_or_else(|| Status::unauthenticated("no client certificate"))?;
    if caller.peer.identity.role != role {
        let had = caller.peer.identity.role;
        return Err(Status::permission_denied(format!(
            "this service is for {role} certificates; the role in yours is {had}"
        )));
    }
    Ok(caller)
}

fn id_of<Id: std::str::FromStr>(caller: &Caller) -> Result<Id, Status> {
    caller
        .peer
        .identity
        .id
        .parse()
        .map_err(|_| Status::unauthenticated("the certificate's id is malformed"))
}

/// The device that calls. Also the connection, so that a blocked device can be hung up on.
pub fn device(caller: Option<&Caller>) -> Result<(DeviceId, &Caller), Status> {
    let caller = admit(caller, Role::Device)?;
    Ok((id_of(caller)?, caller))
}

/// The node that calls.
pub fn node(extensions: &Extensions) -> Result<NodeId, Status> {
    id_of(admit(extensions.get(), Role::Node)?)
}

/// The operator that calls. Until roles exist, every operator is an administrator: this is where they will be told apart.
pub fn operator(extensions: &Extensions) -> Result<OperatorId, Status> {
    id_of(admit(extensions.get(), Role::Operator)?)
}
