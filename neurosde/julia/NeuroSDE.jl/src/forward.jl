# Forward: Euler–Maruyama, strong and weak order 1 (the noise is additive).
#
# A step is two passes: elementwise x = φ(h) and rest = a ∘ h + Î + σ ∘ dB together, then the product rest + Ŵ x.

# Force f = Î + σ ∘ dB of a unit, as slabs: `base` the input, `sigma` the noise's scale, `z` room for the normals; each
# C_NULL where there is none.
struct Force{T}
    base::Ptr{T}
    sigma::Ptr{T}
    z::Ptr{T}
end
Force{T}() where {T} = Force{T}(C_NULL, C_NULL, C_NULL)

function force_room(p::Problem{T}, trials::Int) where {T}
    slab = trials * p.neurons
    (isempty(p.input) ? 0 : room(slab, T)) + (isempty(p.noise) ? 0 : room(slab, T) + room(slab + 2GROUP, T))
end

function prepare_force!(w::Workspace{T}, p::Problem{T}, m::Int, first::Int, trials::Int) where {T}
    N, slab = p.neurons, trials * p.neurons
    base = sigma = z = Ptr{T}(C_NULL)
    if !isempty(p.input)
        base = take!(w, slab)
        gather!(base, p.input, 0, m, first, trials, N)
    end
    if !isempty(p.noise)
        sigma, z = take!(w, slab), take!(w, slab + 2GROUP)
        gather!(sigma, p.sigma, 0, m, first, trials, N)
        scale = p.noise.scale
        map!(v -> vmul(v, splat(typeof(v), scale)), sigma, sigma, slab)
    end
    Force{T}(base, sigma, z)
end

"Increments (over their scale) of step t as a slab."
@inline function increments!(f::Force{T}, p::Problem{T}, t::Int, m::Int, first::Int, trials::Int) where {T}
    N = p.neurons
    drawn(p.noise) || return row(p.noise.increments, t, m, first)
    key = unsafe_load(p.noise.keys, m + 1)
    normals!(f.z, key, t, unsafe_load(p.noise.firsts, m + 1) + first * N, trials * N)
end

"x = φ(h) and rest = a ∘ h + f at step t."
@inline function neurons!(x::Ptr{T}, rest::Ptr{T}, decay::Ptr{T}, h::Ptr{T}, f::Force{T}, p::Problem{T}, t::Int,
        m::Int, first::Int, trials::Int) where {T}
    slab = trials * p.neurons
    p.input.step == 0 || gather!(f.base, p.input, t, m, first, trials, p.neurons)
    if isempty(p.noise)
        f.base == C_NULL ? both!(p.phi, vmul, x, rest, h, (decay,), slab) : both!(p.phi, vfma, x, rest, h, (decay,
            f.base), slab)
    else
        z = increments!(f, p, t, m, first, trials)
        if f.base == C_NULL
            both!(p.phi, (h, a, s, z) -> vfma(a, h, vmul(s, z)), x, rest, h, (decay, f.sigma, z), slab)
        else
            both!(p.phi, (h, a, s, z, f) -> vfma(a, h, vfma(s, z, f)), x, rest, h, (decay, f.sigma, z, f.base), slab)
        end
    end
    nothing
end

@inline loads(::Type{V}, skip::Int) where {V} = ()
@inline loads(::Type{V}, skip::Int, p, others...) where {V} = (vload(V, p + skip), loads(V, skip, others...)...)
@inline part_loads(::Type{V}, skip::Int, count::Int) where {V} = ()
@inline part_loads(::Type{V}, skip::Int, count::Int, p, others...) where {V} =
    (vload_part(V, p + skip, count), part_loads(V, skip, count, others...)...)

"x = φ(h) and rest = combine(h, others...), number by number: the one's latency hides the other's memory."
@inline function both!(phi::F, combine::G, x::Ptr{T}, rest::Ptr{T}, h::Ptr{T}, others::NTuple{K,Ptr{T}},
        count::Int) where {F,G,K,T}
    V = Vec{lanes(T),T}
    i = 0
    while i + lanes(T) <= count
        skip = i * sizeof(T)
        v = vload(V, h + skip)
        vstore!(x + skip, phi(v))
        vstore!(rest + skip, combine(v, loads(V, skip, others...)...))
        i += lanes(T)
    end
    if i < count
        skip, left = i * sizeof(T), count - i
        v = vload_part(V, h + skip, left)
        vstore_part!(x + skip, phi(v), left)
        vstore_part!(rest + skip, combine(v, part_loads(V, skip, left, others...)...), left)
    end
    nothing
end

"Decay a of a unit's trials as a slab."
@inline function gather_decay!(dst::Ptr{T}, p::Problem{T}, m::Int, trials::Int) where {T}
    for k in 0:trials-1
        gather!(dst + k * p.neurons * sizeof(T), p.decay, 0, m, 0, 1, p.neurons)
    end
    nothing
end

function forward_room(p::Problem{T}, trials::Int, plan::TilePlan) where {T}
    room(packed_length(p.neurons, plan, T), T) + 5room(trials * p.neurons, T) + force_room(p, trials)
end

"Simulate trials first … first + trials − 1 of network m; paths go to `activity` and `voltage` (either may be empty)."
function forward_unit!(w::Workspace{T}, p::Problem{T}, activity::Field{T}, voltage::Field{T}, m::Int, first::Int,
        trials::Int) where {T}
    N, slab = p.neurons, trials * p.neurons
    plan = plan_tiles(cld(N, lanes(T)), trials)
    reset!(w, forward_room(p, trials, plan))
    large = large_step(p, trials)
    direct = !isempty(activity) && activity.trial == N  # x goes to its place at once, and is read from there
    GC.@preserve w begin
        packed = take!(w, packed_length(N, plan, T))
        pack!(packed, p.weights + m * N * N * sizeof(T), N, plan, true)
        decay, rest, h, next, scratch = take!(w, slab), take!(w, slab), take!(w, slab), take!(w, slab), take!(w, slab)
        gather_decay!(decay, p, m, trials)
        gather!(h, p.state, 0, m, first, trials, N)
        force = prepare_force!(w, p, m, first, trials)
        for t in 0:p.steps
            x = direct ? row(activity, t, m, first) : scratch
            last = t == p.steps || interrupted(p)
            if last
                isempty(activity) || map!(p.phi, x, h, slab)
            else
                neurons!(x, rest, decay, h, force, p, t, m, first, trials)
            end
            direct || isempty(activity) || scatter!(activity, x, t, m, first, trials, N)
            isempty(voltage) || scatter!(voltage, h, t, m, first, trials, N)
            last && break
            large && exit_if_orphaned(p)
            product!(Tile{T}(rest, next, N * sizeof(T)), plan, packed, 0, x, sizeof(T), N * sizeof(T), N, trials)
            h, next = next, h
        end
    end
    nothing
end

"Parts that each network's trials are cut into: enough for all threads, small enough for the cache."
function forward_units(p::Problem, threads::Int)
    parts = p.networks >= threads ? 1 : cld(threads, p.networks)
    Units(p.networks, p.trials, min(p.trials, max(parts, cld(p.trials, block_trials(p.neurons)))))
end

"""
    forward!(workspaces, problem, activity, voltage, threads) -> Bool

Simulate; true if it ran to its end, false if it was interrupted.
"""
function forward!(workspaces::Vector{Workspace{T}}, p::Problem{T}, activity::Field{T}, voltage::Field{T},
        threads::Int) where {T}
    units = forward_units(p, threads)
    each_unit(workspaces, units, threads) do w, i
        m, first, trials, _ = unit(units, i)
        exit_if_orphaned(p)
        interrupted(p) || forward_unit!(w, p, activity, voltage, m, first, trials)
    end
    !interrupted(p)
end
