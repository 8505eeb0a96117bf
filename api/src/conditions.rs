//! The words of conditions: types and reasons, in one place, so that docs and tests can list them.

/// Service: whether it has the address it asks for. Written by the controller.
pub const ADDRESS_ASSIGNED: &str = "landfall.dev/AddressAssigned";
/// Service: whether its addresses are announced. Absent while that was never in doubt.
pub const ANNOUNCED: &str = "landfall.dev/Announced";
/// `VirtualIP`: whether a node announces the address. Written by speakers.
pub const VIRTUAL_IP_ANNOUNCED: &str = "Announced";
/// `VirtualIP`: whether every node passes its packets on to the nodes that serve it. Written by speakers.
pub const VIRTUAL_IP_STEERED: &str = "Steered";
/// `VirtualIP`: whether every port of its Services has an endpoint. Written by speakers.
pub const VIRTUAL_IP_SERVED: &str = "Served";
/// `VirtualIP`: whether the leader of an address that pods leave by can be their gateway: before, nothing is led to it.
/// Absent on other addresses. Written by speakers.
pub const VIRTUAL_IP_GATEWAY_READY: &str = "GatewayReady";
/// `VirtualIP`: flows of egress policies go on that begin none. Written by speakers, and absent otherwise.
pub const VIRTUAL_IP_DRAINING: &str = "Draining";
/// The reason of [`VIRTUAL_IP_DRAINING`].
pub const FLOWS_GO_ON: &str = "FlowsGoOn";
/// `IPAddressPool`: whether it can be allocated from without doubt. Written by the controller.
pub const POOL_READY: &str = "Ready";

/// `EgressPolicy`: whether its pods have an address and a gateway to leave by. Written by the controller, like all of its.
pub const EGRESS_READY: &str = "Ready";
/// `EgressPolicy`: pods that it selects are tenants of more specific policies. Absent while there are none.
pub const EGRESS_OVERLAPPING: &str = "Overlapping";
/// `EgressPolicy`: pods that it selects are on the host's network and leave as the node does. Absent while there are none.
pub const EGRESS_HOST_NETWORK_PODS: &str = "HostNetworkPods";
/// `EgressPolicy`: pods of namespaces that its addresses are not for. Absent while there are none.
pub const EGRESS_NAMESPACES_NOT_ADMITTED: &str = "NamespacesNotAdmitted";

/// Reasons of [`EGRESS_READY`] beside those of the addresses (refusals of `landfall_core::ipam`) and of
/// [`VIRTUAL_IP_ANNOUNCED`], and of the other conditions of an `EgressPolicy`.
pub mod egress {
    /// It has addresses and a gateway.
    pub const GATEWAY_ELECTED: &str = "GatewayElected";
    /// No node leads its addresses.
    pub const NO_GATEWAY: &str = "NoGateway";
    /// The node that leads its addresses has not put into its kernel yet what it takes to be the gateway.
    pub const GATEWAY_NOT_READY: &str = "GatewayNotReady";
    /// A more specific policy selects them too.
    pub const MORE_SPECIFIC_POLICY: &str = "MoreSpecificPolicy";
    /// Pods on the host's network have no address of their own.
    pub const NOT_MATCHED: &str = "NotMatched";
    /// The pool's serviceAllocation does not name the namespace.
    pub const POOL_DOES_NOT_ADMIT: &str = "PoolDoesNotAdmit";
    /// With `fromService` only the Service's own namespace is admitted.
    pub const OTHER_NAMESPACE: &str = "NotNamespaceOfService";
}

/// Reasons of [`VIRTUAL_IP_ANNOUNCED`].
pub mod announced {
    /// A node leads and announces.
    pub const LEADER_ELECTED: &str = "LeaderElected";
    /// A node leads, on the interface of its default route, since the address is in no node's subnet.
    pub const DEFAULT_ROUTE: &str = "AnnouncedByDefaultRoute";
    /// No node may lead; the message says why, node by node.
    pub const NO_ELIGIBLE_NODE: &str = "NoEligibleNode";
    /// Pods leave by it, and its leader hears less than half of the nodes: it begins no flows and does not answer for it.
    pub const NO_MAJORITY: &str = "NoMajority";
    /// Another station answers for the address.
    pub const ADDRESS_CONFLICT: &str = "AddressConflict";
}

/// Reasons of [`VIRTUAL_IP_SERVED`].
pub mod served {
    /// Each port has one.
    pub const ENDPOINTS: &str = "Endpoints";
    /// Some ports have none; the message names them.
    pub const NO_ENDPOINTS: &str = "NoEndpoints";
}

/// Reasons of [`VIRTUAL_IP_GATEWAY_READY`].
pub mod gateway_ready {
    /// Its kernel goes by all policies of the address.
    pub const IN_FORCE: &str = "InForce";
    /// Not yet; the message names the policies.
    pub const NOT_IN_FORCE: &str = "NotInForce";
}

/// Reasons of [`VIRTUAL_IP_STEERED`].
pub mod steered {
    /// No living node says that it cannot.
    pub const ALL_NODES_STEER: &str = "AllNodesSteer";
    /// An `L2Advertisement` says that the leader takes all packets.
    pub const STEERING_OFF: &str = "SteeringOff";
    /// Some node cannot; the message names each, and why.
    pub const NODES_CANNOT_STEER: &str = "NodesCannotSteer";
}
