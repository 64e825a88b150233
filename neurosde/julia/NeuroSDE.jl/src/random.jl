# Counter-based normals: Philox4x32-7 and Box–Muller.
#
# z[t, e] depends on the key, the step t and the element e alone, so that any thread, chunk or engine makes the same
# numbers. Elements come in groups of 64: lane l = 0 … 15 of group q is one Philox call on the counter
# (16 q + l, t), whose words x0 … x3 give the elements 64 q + l + (0, 16, 32, 48):
#     r(x0) cos θ(x1),  r(x0) sin θ(x1),  r(x2) cos θ(x3),  r(x2) sin θ(x3)
# with r(x) = √(−2 log((⌊x/2⌋ + ½) 2⁻³¹)) and θ(x) = π x 2⁻³¹ for x as a signed integer. Tails reach 6.66.
#
# References: Parallel random numbers: as easy as 1, 2, 3 (Salmon, Moraes, Dror, Shaw, 2011),
# https://doi.org/10.1145/2063384.2063405; 7 rounds is the smallest number that passes BigCrush there.

const PHILOX_ROUNDS = 7
const PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
const PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
const GROUP = 64

# Round keys as vectors: made once per call of `normals!`, read from memory by every round.
@inline round_keys(::Type{V}, key::UInt64) where {V} =
    ntuple(r -> (splat(V, UInt64(key % UInt32 + UInt32(r - 1) * PHILOX_W0)),
                 splat(V, UInt64((key >> 32) % UInt32 + UInt32(r - 1) * PHILOX_W1))), Val(PHILOX_ROUNDS))

"One Philox4x32 call per 64-bit lane; words are the lanes' low halves, what is above them is left to chance."
@inline function philox(c::NTuple{4,V}, keys::Tuple) where {W,V<:Vec{W,UInt64}}
    m0, m1 = splat(V, UInt64(PHILOX_M0)), splat(V, UInt64(PHILOX_M1))
    p0, p1 = vmulwide(c[1], m0), vmulwide(c[3], m1)
    k0, k1 = keys[1]
    next = (vxor(vxor(vlshr(p1, Val(32)), c[2]), k0), p1, vxor(vxor(vlshr(p0, Val(32)), c[4]), k1), p0)
    philox(next, Base.tail(keys))
end
@inline philox(c::NTuple{4,V}, ::Tuple{}) where {W,V<:Vec{W,UInt64}} = c

"Two normals from two words, each a vector of 32-bit integers."
@inline function box_muller(::Type{T}, radial::Vec{W,Int32}, angular::Vec{W,Int32}) where {W,T<:Real32or64}
    V = Vec{W,T}
    u = vfma(vfloat(T, vlshr(radial, Val(1))), vconst(V, 2.0^-31), vconst(V, 2.0^-32))
    r = vsqrt(vmul(vlog(u), vconst(V, -2)))
    cosine, sine = vcossin(T, angular)
    vmul(r, cosine), vmul(r, sine)
end

_iota(::Type{Vec{W,UInt64}}) where {W} = Vec{W,UInt64}(ntuple(l -> VecElement(UInt64(l - 1)), Val(W)))

"Numbers that `normals!` writes for `count` elements from `first` on: whole groups."
group_span(first::Int, count::Int) = (cld(first % GROUP + count, GROUP)) * GROUP

"""
    normals!(dst, key, step, first, count) -> pointer

Write z[step, first … first + count − 1] under `key` to `dst`, which has room for `group_span(first, count)` numbers;
returns the pointer of z[step, first].
"""
function normals!(dst::Ptr{T}, key::UInt64, step::Int, first::Int, count::Int) where {T<:Real32or64}
    V = Vec{8,UInt64}
    keys = round_keys(V, key)
    c2, c3, lane = splat(V, step % UInt64), splat(V, UInt64(0)), _iota(V)
    q, skip = divrem(first, GROUP)
    groups = cld(skip + count, GROUP)
    # Words first, then normals in their place: two short loops, whose iterations overlap in the processor as those of
    # one long loop do not.
    for half in 0:2groups-1  # of a group: eight lanes
        call = 8 * (2q + half) % UInt64  # a multiple of 8: adding the lane never carries into the high word
        words = philox((vadd(splat(V, call), lane), splat(V, call >> 32), c2, c3), keys)
        at = Ptr{Int32}(dst + half ÷ 2 * GROUP * sizeof(T)) + half % 2 * 32
        for p in 1:4
            vstore!(at + (p - 1) * 16 * sizeof(T), vlow(words[p]))
        end
    end
    for pair in 0:2groups-1
        at = dst + pair * 32 * sizeof(T)
        for half in 1:-1:0  # the second half's normals may lie where no words are
            radial = vload(Vec{8,Int32}, Ptr{Int32}(at) + half * 32)
            angular = vload(Vec{8,Int32}, Ptr{Int32}(at + 16 * sizeof(T)) + half * 32)
            cosine, sine = box_muller(T, radial, angular)
            vstore!(at + half * 8 * sizeof(T), cosine)
            vstore!(at + (16 + half * 8) * sizeof(T), sine)
        end
    end
    dst + skip * sizeof(T)
end

"""
    standard_normals(T, key, steps, count; first=0, start=0) -> Matrix{T} of size (count, steps)

Independent N(0, 1) numbers z[start + t, first + e]; the same key gives the same numbers whatever is drawn beside them.
"""
function standard_normals(::Type{T}, key::Integer, steps::Integer, count::Integer; first::Integer = 0,
        start::Integer = 0) where {T<:Real32or64}
    out = Matrix{T}(undef, count, steps)
    buffer = Vector{T}(undef, group_span(Int(first), Int(count)))
    GC.@preserve buffer begin
        for t in 1:steps
            z = normals!(pointer(buffer), key % UInt64, Int(start + t - 1), Int(first), Int(count))
            for e in 1:count
                out[e, t] = unsafe_load(z, e)
            end
        end
    end
    out
end
