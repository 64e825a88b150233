# The interface from Julia: arrays in, arrays out.

# Folded arrays of a call, kept alive while the kernels hold pointers to them.
struct Folded{T}
    weights::Array{T,3}     # (pre, post, network): row-major (post, pre)
    state::Array{T,3}       # (neuron, trial, network)
    decay::Vector{T}
    gain::Vector{T}         # b of Ŵ = b ∘ W
    input::Array{T}         # (neuron, trial, network, step) with singleton axes, or empty
    sigma::Vector{T}
    increments::Array{T,4}  # (neuron, trial, network, step), or empty
    keys::Vector{UInt64}
    firsts::Vector{Int64}
    scale::T
    phi::Activation
    steps::Int
end

_per_neuron(name, x::Real, N, ::Type{T}) where {T} = fill(T(x), N)
function _per_neuron(name, x::AbstractVector, N, ::Type{T}) where {T}
    length(x) == N || throw(DimensionMismatch("$name must be a number or one per neuron ($N); got $(length(x))."))
    Vector{T}(x)
end

function _fold(W::AbstractArray{T}, h0::AbstractArray{T}; dt::Real, steps::Integer, tau = 1, input = nothing, sigma = 0,
               phi::Symbol = :tanh, drive::Symbol = :scaled, seed::Union{Integer,Nothing} = nothing,
               increments = nothing) where {T<:Real32or64}
    N = size(W, 1)
    ndims(W) in (2, 3) && size(W, 2) == N ||
        throw(DimensionMismatch("W must be (post, pre) or (post, pre, network) and square; got $(size(W))."))
    M = size(W, 3)
    ndims(h0) <= 3 && size(h0, 1) == N && size(h0, 3) in (1, M) ||
        throw(DimensionMismatch("h0 must be (neuron, trial, network) for $N neurons, $M networks; got $(size(h0))."))
    dt > 0 || throw(ArgumentError("dt must be positive; got $dt."))
    steps >= 0 || throw(ArgumentError("steps must not be negative; got $steps."))
    drive in (:scaled, :unscaled) || throw(ArgumentError("drive must be :scaled or :unscaled; got :$drive."))
    K = size(h0, 2)
    taus, sigmas = _per_neuron("tau", tau, N, T), _per_neuron("sigma", sigma, N, T)
    all(taus .> 0) || throw(ArgumentError("tau must be positive; got $tau."))
    all(sigmas .>= 0) || throw(ArgumentError("sigma must not be negative; got $sigma."))
    gain = drive === :scaled ? T(dt) ./ taus : fill(T(dt), N)
    weights = Array{T,3}(undef, N, N, M)
    for m in 1:M, i in 1:N, j in 1:N
        weights[j, i, m] = gain[i] * W[i, j, m]
    end
    state = Array{T,3}(undef, N, K, M)
    state .= reshape(h0, N, K, size(h0, 3))
    folded_input = if input === nothing
        zeros(T, 0, 0, 0, 0)
    else
        I = input isa Real ? fill(T(input), N) : input
        I = reshape(I, size(I, 1), size(I, 2), size(I, 3), size(I, 4))
        all(size(I, d) in (1, n) for (d, n) in enumerate((N, K, M, steps))) ||
            throw(DimensionMismatch("input must broadcast to (neuron, trial, network, step) = $((N, K, M, steps)); got $(size(I))."))
        Array{T}(gain .* I)
    end
    noisy = any(sigmas .> 0)
    seed !== nothing && increments !== nothing &&
        throw(ArgumentError("give the noise as seed or as increments, not both."))
    noisy && seed === nothing && increments === nothing && throw(ArgumentError("sigma > 0 needs a seed or increments."))
    dB = increments === nothing || !noisy ? zeros(T, 0, 0, 0, 0) : Array{T}(reshape(increments, N, K, M, steps))
    keys = fill((seed === nothing ? 0 : seed) % UInt64, M)
    scale = isempty(dB) ? T(sqrt(dt)) : one(T)
    noisy || empty!(keys)
    isempty(dB) || empty!(keys)
    Folded{T}(weights, state, one(T) .- T(dt) ./ taus, gain, folded_input, sigmas, dB, keys,
        Int64[(m - 1) * K * N for m in 1:M], scale, activation(phi), steps)
end

"A field over an array (neuron, trial, network, step), axes of length 1 repeated."
function _field(A::AbstractArray{T}) where {T}
    isempty(A) && return Field{T}()
    stride_or_0(d) = size(A, d) == 1 ? 0 : stride(A, d)
    Field{T}(pointer(A), stride_or_0(4), stride_or_0(3), stride_or_0(2), size(A, 1) == 1 ? 0 : 1)
end
# A field of outputs or full arrays: strides count even where the axis is 1 long.
_whole(A::AbstractArray{T}) where {T} = Field{T}(pointer(A), stride(A, 4), stride(A, 3), stride(A, 2), 1)

function _problem(f::Folded{T}) where {T}
    N, K, M = size(f.state)
    noise = isempty(f.increments) && isempty(f.keys) ? Noise{T}() :
        Noise{T}(isempty(f.increments) ? Field{T}() : _whole(f.increments),
                 isempty(f.keys) ? Ptr{UInt64}(C_NULL) : pointer(f.keys), pointer(f.firsts), f.scale)
    Problem(f.phi, M, K, N, f.steps, pointer(f.weights), _whole(f.state), Field{T}(pointer(f.decay), 0, 0, 0, 1),
            _field(f.input), Field{T}(pointer(f.sigma), 0, 0, 0, 1), noise, Watch())
end

"""
    simulate(W, h0; dt, steps, tau=1, input=nothing, sigma=0, phi=:tanh, drive=:scaled, seed=nothing,
             increments=nothing, threads=Threads.nthreads()) -> (activity, voltage)

Simulate h[t+1] = h[t] + dt/τ·(−h[t] + W φ(h[t]) + I[t]) + σ dB[t], x[t] = φ(h[t]), by Euler–Maruyama (strong and weak
order 1). With `drive=:unscaled` the drift is −h/τ + W φ(h) + I.

- `W`: weights (post, pre) or (post, pre, network), Float32 or Float64.
- `h0`: initial voltage (neuron,), (neuron, trial) or (neuron, trial, network).
- `tau`, `sigma`: a number or one per neuron. `input`: a number or an array broadcasting to (neuron, trial, network, step).
- `phi`: :tanh, :sigmoid, :softplus, :relu or :linear.
- `seed`: of the noise, the same as Python's; or `increments`: dB itself, (neuron, trial, network, step), in units of √time.

Both results are (neuron, trial, network, time) with `steps + 1` times. Errors: `DimensionMismatch`, `ArgumentError`.
"""
function simulate(W::AbstractArray{T}, h0::AbstractArray{T}; threads::Integer = Threads.nthreads(),
        options...) where {T<:Real32or64}
    f = _fold(W, h0; options...)
    activity = Array{T,4}(undef, size(f.state)..., f.steps + 1)
    voltage = similar(activity)
    GC.@preserve f activity voltage begin
        forward!([Workspace{T}() for _ in 1:threads], _problem(f), _whole(activity), _whole(voltage), Int(threads))
    end
    activity, voltage
end

"""
    gradients(W, h0, d_activity, d_voltage=nothing; options...) -> (W, h0, tau, sigma, input)

Gradients of a loss with respect to the arguments of `simulate`, called with the same options, given its gradients with
respect to activity and voltage, each (neuron, trial, network, time) or `nothing`. Exact for the scheme: this is its
discrete adjoint. `tau` and `sigma` are per neuron, `input` has the shape (neuron, trial, network, step) with the axes
summed that the input repeats.
"""
function gradients(W::AbstractArray{T}, h0::AbstractArray{T}, d_activity, d_voltage = nothing;
        threads::Integer = Threads.nthreads(), options...) where {T<:Real32or64}
    f = _fold(W, h0; options...)
    N, K, M = size(f.state)
    activity = Array{T,4}(undef, N, K, M, f.steps + 1)
    voltage = similar(activity)
    path(g) = g === nothing ? zeros(T, 0, 0, 0, 0) : Array{T}(reshape(g, size(activity)))
    gx, gh = path(d_activity), path(d_voltage)
    parts = adjoint_parts(M, K)
    d_weights, d_state = zeros(T, N, N, M, parts), zeros(T, N, K, M)
    d_decay, d_sigma = zeros(T, N, 1, M, parts), zeros(T, N, 1, M, parts)
    _, Ki, _, Si = isempty(f.input) ? (0, 0, 0, 0) : size(f.input)
    d_input = zeros(T, N, Ki, M, Si, parts)
    summed(A) = Field{T}(pointer(A), stride(A, 4), stride(A, 3), 0, 1)
    GC.@preserve f activity voltage gx gh d_weights d_state d_decay d_sigma d_input begin
        p = _problem(f)
        workspaces = [Workspace{T}() for _ in 1:threads]
        forward!(workspaces, p, _whole(activity), _whole(voltage), Int(threads))
        of_input = isempty(f.input) ? Field{T}() :
            Field{T}(pointer(d_input), Si == 1 ? 0 : stride(d_input, 4), stride(d_input, 3),
                Ki == 1 ? 0 : stride(d_input, 2), 1)
        out = Cotangents{T}(parts, _whole(d_state), pointer(d_weights), summed(d_decay), of_input, stride(d_input, 5),
                            isempty(p.noise) ? Field{T}() : summed(d_sigma), Field{T}())
        adjoint!(workspaces, p, _whole(activity), _whole(voltage), isempty(gx) ? Field{T}() : _whole(gx),
                 isempty(gh) ? Field{T}() : _whole(gh), out, Int(threads))
    end
    _unfold(f, W, d_weights, d_state, d_decay, d_sigma, d_input; options...)
end

# Through the folding: a = 1 − dt/τ, Ŵ = b W, Î = b I with b = dt/τ (scaled) or dt.
function _unfold(f::Folded{T}, W, d_weights, d_state, d_decay, d_sigma, d_input; dt, tau = 1, input = nothing,
        drive = :scaled, options...) where {T}
    N, K, M = size(f.state)
    by_weights = permutedims(dropdims(sum(d_weights, dims = 4), dims = 4), (2, 1, 3))  # (post, pre, network)
    by_input = dropdims(sum(d_input, dims = 5), dims = 5)
    by_decay = dropdims(sum(d_decay, dims = (2, 3, 4)), dims = (2, 3, 4))
    taus = _per_neuron("tau", tau, N, T)
    by_tau = by_decay .* T(dt) ./ taus .^ 2
    if drive === :scaled
        by_gain = dropdims(sum(by_weights .* W, dims = (2, 3)), dims = (2, 3))
        if !isempty(f.input)
            by_gain += dropdims(sum(by_input .* f.input ./ f.gain, dims = (2, 3, 4)), dims = (2, 3, 4))
        end
        by_tau .-= by_gain .* T(dt) ./ taus .^ 2
    end
    d_I = isempty(f.input) ? nothing : (size(f.input, 3) == 1 ? sum(f.gain .* by_input, dims = 3) : f.gain .* by_input)
    (W = reshape(f.gain .* by_weights, size(W)), h0 = d_state, tau = by_tau,
     sigma = dropdims(sum(d_sigma, dims = (2, 3, 4)), dims = (2, 3, 4)), input = d_I)
end
