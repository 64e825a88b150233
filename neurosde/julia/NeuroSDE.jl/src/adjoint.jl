# The discrete adjoint, exact for the scheme. With g the loss's gradient with respect to the path,
#
#     λ[t] = a ∘ λ[t+1] + φ'(h[t]) ∘ (Ŵᵀ λ[t+1] + gx[t]) + gh[t]
#     ∂L/∂Ŵ = Σ λ[t+1] φ(h[t])ᵀ,  ∂L/∂a = Σ λ[t+1] h[t],  ∂L/∂Î = Σ λ[t+1],  ∂L/∂σ = Σ λ[t+1] dB[t],  ∂L/∂h0 = λ[0].
#
# The path is the tape: x where the slope follows from it, else x is computed from h again. Products for ∂L/∂Ŵ are put
# off until a chunk of steps has filled, then made as one update of rank steps × trials.

"Gradients asked for; empty fields are not. Sums over trials are per part: see `adjoint_parts`."
struct Cotangents{T}
    parts::Int
    state::Field{T}       # (network, trial)
    weights::Ptr{T}       # (part, network, post, pre), or C_NULL
    decay::Field{T}       # (part as step, network)
    input::Field{T}       # (step or 0, network, trial or 0)
    input_part::Int       # numbers from one part's to the next's
    sigma::Field{T}       # (part as step, network, trial or 0)
    increments::Field{T}  # (step, network, trial)
end

# From this many neurons on, a chunk is packed before it is multiplied: its rows lie on too many pages and cache lines.
const REPACK = 256

"Add Σ λ xᵀ over the rows of two chunks to the sums; `scratch` has room for both, packed, or is C_NULL."
function outer_products!(tile::Tile{T}, p::TilePlan, x::Ptr{T}, lambda::Ptr{T}, terms::Int, N::Int,
        scratch::Ptr{T}) where {T}
    if scratch == C_NULL
        product!(tile, p, x, N * sizeof(T), lambda, N * sizeof(T), sizeof(T), terms, N)
    else
        packed_lambda = scratch + terms * p.vectors * REGISTER_BYTES
        pack!(scratch, x, N, p, false, terms)
        pack_columns!(packed_lambda, lambda, terms, N, p.width)
        product!(tile, p, scratch, 0, packed_lambda, 0, sizeof(T), terms, N)
    end
    nothing
end

"Steps per chunk: enough terms to pay for reading and writing the sums, few enough to stay in cache."
chunk_steps(steps::Int, trials::Int, N::Int) = clamp(cld(N < REPACK ? 96 : 256, trials), 1, max(steps, 1))

function adjoint_room(p::Problem{T}, trials::Int, plan::TilePlan) where {T}
    slab = trials * p.neurons
    S = chunk_steps(p.steps, trials, p.neurons)
    room(packed_length(p.neurons, plan, T), T) + 4room(slab, T) +
        room(S * slab, T) + room((S + 1) * slab, T) + force_room(p, trials) +
        (p.neurons >= REPACK ? room(S * trials * (p.neurons + plan.vectors * lanes(T)), T) : 0)
end

@inline with_slope(phi) = (x, through, a, later) -> vfma(slope(phi, x), through, vmul(a, later))

"Sum of a slab's trials (or each of them, where the field has trials) added to a field's rows."
@inline function accumulate!(f::Field{T}, t::Int, m::Int, first::Int, trials::Int, N::Int, a::Ptr{T},
        b::Ptr{T}) where {T}
    for k in 0:trials-1
        dst = row(f, t, m, f.trial == 0 ? 0 : first + k)
        skip = k * N * sizeof(T)
        b == C_NULL ? map2!(vadd, dst, dst, a + skip, N) : map3!(vfma, dst, a + skip, b + skip, dst, N)
    end
    nothing
end

"""
Adjoint of trials first … first + trials − 1 of network m, in blocks of trials whose slabs stay in cache; sums go to
those of `part`.
"""
function adjoint_unit!(w::Workspace{T}, p::Problem{T}, x::Field{T}, h::Field{T}, gx::Field{T}, gh::Field{T},
        out::Cotangents{T}, m::Int, first::Int, trials::Int, part::Int) where {T}
    N, sz = p.neurons, sizeof(T)
    blocks = Units(1, trials, cld(trials, block_trials(N)))
    most = cld(trials, blocks.parts)
    plan = plan_tiles(cld(N, lanes(T)), most)
    padded = plan.vectors * lanes(T)
    reset!(w, adjoint_room(p, most, plan))
    if out.weights != C_NULL
        length(w.sums) < N * padded && resize!(w.sums, N * padded)
        fill!(view(w.sums, 1:N*padded), zero(T))
    end
    GC.@preserve w begin
        packed = take!(w, packed_length(N, plan, T))
        pack!(packed, p.weights + m * N * N * sz, N, plan, false)
        used = w.used
        for b in 0:blocks.parts-1
            w.used = used
            _, skip, count, _ = unit(blocks, b)
            adjoint_block!(w, p, x, h, gx, gh, out, plan, packed, m, first + skip, count, part)
        end
        if out.weights != C_NULL
            dst = out.weights + (part * p.networks + m) * N * N * sz
            for i in 0:N-1
                unsafe_copyto!(dst + i * N * sz, pointer(w.sums) + i * padded * sz, N)
            end
        end
    end
    nothing
end

function adjoint_block!(w::Workspace{T}, p::Problem{T}, x::Field{T}, h::Field{T}, gx::Field{T}, gh::Field{T},
        out::Cotangents{T}, plan::TilePlan, packed::Ptr{T}, m::Int, first::Int, trials::Int, part::Int) where {T}
    N, slab, sz = p.neurons, trials * p.neurons, sizeof(T)
    null = Ptr{T}(C_NULL)
    repack = N >= REPACK
    sums_plan = plan_tiles(plan.vectors, N, repack)
    padded = plan.vectors * lanes(T)
    S = chunk_steps(p.steps, trials, N)
    large = large_step(p, trials)
    decay, outer, through, direct = take!(w, slab), take!(w, slab), take!(w, slab), take!(w, slab)
    xs, lambdas = take!(w, S * slab), take!(w, (S + 1) * slab)
    repacked = repack ? take!(w, S * trials * (N + padded)) : null
    gather_decay!(decay, p, m, trials)
    noise_wanted = !isempty(out.sigma) || !isempty(out.increments)
    force = noise_wanted ? prepare_force!(w, p, m, first, trials) : Force{T}()
    d_input = Field{T}(out.input.pointer + part * out.input_part * sz, out.input.step, out.input.network,
        out.input.trial, 1)
    isempty(gx) && map!(v -> vconst(typeof(v), 0), outer, outer, slab)

    filled = 0  # steps in the chunk: rows of x[t] in `xs` and of λ[t + 1] in `lambdas`
    for t in p.steps:-1:0
        interrupted(p) && return nothing
        large && exit_if_orphaned(p)
        later = lambdas + filled * slab * sz  # λ[t+1]
        now = t == p.steps ? lambdas : later + slab * sz
        at = xs + filled * slab * sz
        if isempty(x)
            gather!(direct, h, t, m, first, trials, N)
            map!(p.phi, at, direct, slab)
        else
            gather!(at, x, t, m, first, trials, N)
        end
        isempty(gx) || gather!(outer, gx, t, m, first, trials, N)
        if t < p.steps
            product!(Tile{T}(outer, through, N * sz), plan, packed, 0, later, sz, N * sz, N, trials)
            map4!(with_slope(p.phi), now, at, through, decay, later, slab)
        else
            map2!((x, u) -> vmul(slope(p.phi, x), u), now, at, outer, slab)
        end
        if !isempty(gh)
            gather!(direct, gh, t, m, first, trials, N)
            map2!(vadd, now, now, direct, slab)
        end
        t == p.steps && continue
        isempty(out.input) || accumulate!(d_input, t, m, first, trials, N, later, null)
        if !isempty(out.decay)
            gather!(direct, h, t, m, first, trials, N)
            accumulate!(out.decay, part, m, first, trials, N, later, direct)
        end
        if !isempty(out.sigma)
            map!(v -> vmul(v, vconst(typeof(v), p.noise.scale)), through, later, slab)
            accumulate!(out.sigma, part, m, first, trials, N, through, increments!(force, p, t, m, first, trials))
        end
        if !isempty(out.increments)
            map2!(vmul, through, force.sigma, later, slab)
            scatter!(out.increments, through, t, m, first, trials, N)
        end
        filled += 1
        if filled == S || t == 0
            out.weights == C_NULL ||
                outer_products!(Tile{T}(pointer(w.sums), pointer(w.sums), padded * sz), sums_plan, xs, lambdas,
                    filled * trials, N, repacked)
            unsafe_copyto!(lambdas, now, slab)
            filled = 0
        end
    end
    isempty(out.state) || scatter!(out.state, lambdas, 0, m, first, trials, N)
    nothing
end

"""
Parts that each network's trials are cut into, for `Cotangents`; sums over trials are made per part and added up by the
caller. A matter of the shapes alone, so that the result does not depend on the number of threads.
"""
adjoint_parts(networks::Int, trials::Int) = networks >= 8 ? 1 : clamp(trials ÷ 16, 1, 16 ÷ networks)

"""
    adjoint!(workspaces, problem, x, h, gx, gh, out, threads) -> Bool

Gradients of a loss whose gradient with respect to the activity is gx and to the voltage gh (either may be empty), given
the path x or h; sums in `out` must hold zeros. True if it ran to its end.
"""
function adjoint!(workspaces::Vector{Workspace{T}}, p::Problem{T}, x::Field{T}, h::Field{T}, gx::Field{T}, gh::Field{T},
                  out::Cotangents{T}, threads::Int) where {T}
    units = Units(p.networks, p.trials, out.parts)
    each_unit(workspaces, units, threads) do w, i
        m, first, trials, part = unit(units, i)
        exit_if_orphaned(p)
        interrupted(p) || adjoint_unit!(w, p, x, h, gx, gh, out, m, first, trials, part)
    end
    !interrupted(p)
end
