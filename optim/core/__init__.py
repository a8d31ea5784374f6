"""The subspace-projection core: one lifecycle, five verbs, and interchangeable strategies behind them.

Read `verbs` first, then `bucket` and `view`: with these three every `update()` of a named optimizer can be read. A step
goes through the modules in this order:

    Lifecycle.step -> Groups._planned (buckets, rebuilt only after a change) -> update(bucket), the paper's box
        -> refresh [projector, linalg, carry] -> project [basis] -> inner [apply, rules, codec] -> project_back_ [basis]

**From parameter groups to buckets**

- `optimizer`: `SubspaceOptimizer`, constructor and defaults of all methods that project.
- `lifecycle`: `Lifecycle`, the step: gathers gradients, creates state, hands buckets to `update` or `plain`.
- `groups`: `Groups`, options of groups, description of state, changes between two steps, loading.
- `bucketing`: sorts parameters of equal shape, dtype, device and layout into plans.
- `bucket`: `Plan`, what stays between steps, and `Bucket`, what one step adds to it: gradients and states.
- `view`: `MatrixView`, the orientation in which every projection is `R = A P`.
- `hyper`: `Hyper`, the options of a group frozen for one step; aliases and spelling.
- `validate`, `kinds`: checks of options, of their ranges and of the kinds of their values.
- `adaptive`: `rank="auto"`. `summary`: the table of `optimizer.summary()`.
- `stack`: stacks of expert matrices in one parameter. `plain`: the step of parameters that are not projected.

**The verbs and what they need**

- `verbs`: `refresh`, `project`, `inner`, `project_back_`, `follow`.
- `refresh`: when a basis changes. `projector`: how the new one is found, all values of `projector=`.
- `linalg`: range finder, orthonormalisation, Ritz rotation. `cross_head`: one basis for all heads of a layer.
- `descend`: a basis that follows the gradient in every step (online PCA).
- `basis`: how P is kept and multiplied: dense here, `coordinates` (indices), `flat` (single entries), `segments` (one
  basis a range of rows), `compact` (int8 and int4), `seeded` (never stored).
- `change`: old and new basis compared. `carry`: what becomes of the moments then.
- `rule`, `rules`: the inner rules (AdamW, Lion, SGD, RMSprop, Adafactor). `apply`: runs one on state as it is stored.
- `target`: weights as they are written to, with their mode of rounding. `counts`: step counts on host or device.

**What single papers add**

- `residual`: Fira's and APOLLO's scaled gradient and its limiter.
- `free`, `selection`, `blocks`: FRUGAL's state-free part, its choice of entries, and tensors that take turns.
- `sparse`, `support`, `entries`: GaLore+'s moments at k entries, what they are, and where they lie.
- `adafactor`, `factored`, `whitened`: Adafactor's update, its formulas, and Flora's use of them.
- `weight_norm`: length and direction of every row as coordinates, around any method.

**State**

- `spec`: `Spec`, a state tensor described before it exists. `state`: the state of a parameter, described and allocated.
- `codec`: how moments are stored, floating or in 8 bits.
- `reconcile`: options that change after the first step. `checkpoint`: loading. `conversion`: other ranks and bits.
- `state_creation`: the step by which checkpointing tools create state to load into.
- `magnitude`: the largest entry of a gradient over all of its pieces, by which ranks decide alike.

**Sharded parameters and replicas**

- `sharding`: the placements of a DTensor. `layout`: `Layout`, the sums and gathers that follow from them, empty on one
  device. `sides`: layouts of R, of P and of statistics.
- `together`: several matrices in one collective. `spread`: bases of which every rank keeps some rows.
- `sharding_limits`: what cannot be sharded. `flattening`, `partitions`: matrices that FSDP1 and DeepSpeed flatten.

**Gradients and steps in other forms**

- `accumulation`: micro-batches summed in a subspace. `released`: steps within the backward pass.
- `schedule`, `cuda_graphs`: which steps may be replayed as a CUDA graph, and the graphs.
"""
